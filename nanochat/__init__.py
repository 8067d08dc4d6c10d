"""nanochat: raw text to a chatting language model, one module a job."""
