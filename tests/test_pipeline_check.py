import itertools
import resource
import subprocess
import sys

import pytest

from nanochat import pipeline
from nanochat.errors import UserError


def said(written, stage, *command):
    """What is wrong with a stage, in the user's words; None: nothing."""
    words = [stage, "--in", "x", "--", *command]
    try:
        pipeline.check(written, "\0".join(["first", "--skip=why", "", *words, "", ""]))
    except UserError as error:
        return str(error)
    return None


def base_train(*written):
    """Flags as pretrain.sh hands them on."""
    launch = ["python", "-m", "nanochat.launch", "--nproc-per-node=2", "--", "-m", "scripts.base_train"]
    return said(written, "base_train", *launch, "--depth=12", "--resume=auto", *written)


@pytest.mark.parametrize(
    "words",
    [["--mup"], ["--width=1024", "--mup"], ["--no-mup"], ["--core-metric-every=-1"], ["--window_pattern=SL"],
     ["--compile"], ["--target-flops=1e15"], ["--arch=speedrun"], ["--monitor-interval=research"]],
)  # fmt: skip
def test_flags_that_base_train_takes(words):
    assert base_train(*words) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dept=26"], "--dept=26: Unknown option: --dept. Did you mean --depth?"),
        (["--posttrain=1"], "--posttrain=1: Unknown option"),
        (["--mup=5"], "--mup=5: "),
        (["--width=abc"], "--width=abc: "),
        (["--width"], "--width: Parameter --width requires an argument"),
        (["--save-every=0.5"], "--save-every=0.5: "),
        (["--save_every=x"], "--save_every=x: "),
        (["--no-such"], "--no-such: "),
        (["--a(b[=*"], "--a(b[=*: Unknown option"),
        (["--num-iterations=1", "--num-iterations=2"], "--num-iterations=2: "),
        (["--resume=never"], "--resume=never: Parameter --resume specified multiple times"),
        (["--mup", "--width=100"], "--width=100 is no multiple of --head-dim=128"),
        (["--base-width=256"], "--base-width=256 does nothing without --mup"),
        (["--monitor-interval=often"], "--monitor-interval=often"),
        (["--total-batch-size=1000"], "--total-batch-size=1000 is no multiple of --max-seq-len"),
        (["--window-pattern=XY"], "window_pattern='XY'"),
        (["--target-param-data-ratio=0"], "--target-param-data-ratio=0: no horizon"),
    ],
)
def test_flags_that_it_would_refuse_are_named_as_they_were_written(words, message):
    assert base_train(*words).startswith(message)


def test_settings_are_named_as_they_were_written():
    train = ["base_train", "python", "-m", "scripts.base_train", "--depth=0"]
    assert said(["DEPTH=0"], *train).startswith("DEPTH=0: ")
    assert said(["MODEL_DEPTH=0"], *train).startswith("MODEL_DEPTH=0: ")
    assert said(["DEPTH=3", "--depth=0"], *train).startswith("--depth=0: ")  # the flag goes before the environment
    shards = ["dataset", "python", "-m", "nanochat.dataset", "--source=climbmix", "-n", "7000"]
    assert said(["SHARDS=7000"], *shards).startswith("SHARDS=7000: climbmix has 6542 train shards")
    tokenizer = ["tok_train", "python", "-m", "scripts.tok_train", "--vocab-size=3"]
    assert said(["--vocab_size=3"], *tokenizer).startswith("--vocab_size=3: ")
    source = ["dataset", "python", "-m", "nanochat.dataset", "--source=c4"]
    assert said(["SOURCE=c4"], *source) == "SOURCE=c4: expected fineweb-edu, climbmix, pydocs or local:DIR"


def test_a_wandb_that_is_not_reached_is_said_before_anything_is_fetched(monkeypatch, capsys):
    reasons = [None, "there is no API key; set WANDB_API_KEY"]
    monkeypatch.setattr("nanochat.train.tracking._refusal", lambda: reasons.pop(0))
    for name in ("dummy", "first", "first"):
        assert base_train(f"--run={name}") is None
    assert capsys.readouterr().out.splitlines() == [
        "warning: W&B is not reached: there is no API key; set WANDB_API_KEY; training would record only here"
    ]
    assert reasons == []


def test_neither_torch_nor_the_hub_is_imported_to_check_a_chain():
    stages = {"dataset": "--source=pydocs", "make_eval_bundle": "", "tok_train": "", "tok_eval": "", "base_train": "",
              "base_loss": "", "base_eval": "", "chat_data": "--tasks=Identity", "mid_train": "", "chat_sft": "",
              "chat_eval": "--stage=sft", "chat_rl": ""}  # fmt: skip
    modules = {name: f"{'nanochat' if name == 'dataset' else 'scripts'}.{name}" for name in stages}
    words = [[name, "--", "python", "-m", modules[name], *flags.split(), ""] for name, flags in stages.items()]
    text = "".join(f"{word}\0" for word in itertools.chain(*words))
    command = [sys.executable, "-X", "importtime", "-m", "nanochat.pipeline", "check", "--"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rsplit("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "pyarrow" in imported
    assert not imported & {"torch", "wandb", "huggingface_hub", "rich.console", "regex"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.4  # 0.6 s of an idle core


def test_what_is_no_text_is_refused():
    assert said(["RUN_ID=\udcff"], "x", "true").startswith("'RUN_ID=\\udcff': ")
    assert said(["SOURCE=local:/data/文本 2"], "x", "true") is None


def test_folders_must_hold_what_the_stages_need(tmp_path):
    bundle = ["eval_bundle", "python", "-m", "scripts.make_eval_bundle", f"--from-dir={tmp_path}"]
    assert said(["TASK_DATA=b", "EVAL_BUNDLE=a"], *bundle).startswith("EVAL_BUNDLE=a: no evaluation bundle")
    chat = ["chat_data", "python", "-m", "scripts.chat_data", f"--from-dir={tmp_path}", "--source=pydocs"]
    assert said(["TASK_DATA=b", "EVAL_BUNDLE=a"], *chat, "--tasks=GSM8K,Identity").startswith(
        "TASK_DATA=b: none of GSM8K"
    )
    assert said(["TASK_DATA=b"], *chat, "--tasks=Identity") is None
    (tmp_path / "gsm8k").mkdir()
    for name in ("test-00000-of-00002.parquet", "train-00000-of-00001.parquet"):
        (tmp_path / "gsm8k" / name).touch()
    assert (
        said(["TASK_DATA=b"], *chat, "--tasks=GSM8K")
        == f"TASK_DATA=b: GSM8K: 1 of 2 test files are in {tmp_path}/gsm8k"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("HF_ENDPOINT", "mirror"), ("ALL_PROXY", "socks5h://u:s3cret@h:1"), ("SSL_CERT_FILE", "/nope")]
)
def test_the_network_must_be_usable_where_it_is_needed(monkeypatch, name, value):
    from huggingface_hub import close_session

    close_session()
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv(name, value)
    for source, stage in (("climbmix", "nanochat.dataset"), ("pydocs", "scripts.chat_data")):
        message = said([], "some", "python", "-m", stage, f"--source={source}")
        assert message.startswith(f"{name}=") and "s3cret" not in message
    assert said([], "dataset", "python", "-m", "nanochat.dataset", "--source=pydocs") is None
    assert said([], "chat_data", "python", "-m", "scripts.chat_data", "--tasks=Identity") is None


@pytest.mark.parametrize("folder", ["tokenizer", "checkpoints"])
def test_a_file_in_the_place_of_a_folder_of_the_store_is_said_before_the_first_stage(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    words = ["train", "--out", "tokenizer", "--out", "checkpoints/base/d4/COMPLETE", "--", "python"]
    stages = "\0".join([*words, "", ""])
    pipeline.check([], stages)
    (tmp_path / folder).touch()
    with pytest.raises(UserError, match=rf"{folder} is a file, in the place of a folder: move it"):
        pipeline.check([], stages)
