"""At home elsewhere: checkpoints as Hugging Face Transformers reads them, and back (export, load, push), and
lm-evaluation-harness as their judge (lm_eval, lm_eval_tasks)."""
