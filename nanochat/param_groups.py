"""Which parameter of the model is trained by what, and at which rate."""

from typing import Any

from torch import nn

from nanochat.optim import MuonAdamW

ADAMW_FOR_MATRICES = {"betas": (0.9, 0.95), "eps": 1e-8}
ADAMW_MATRIX_LR = 0.05  # times Muon's rate: 0.02 becomes 1e-3 at width 768, and goes with 1/width


def gpt_optimizer(
    model: nn.Module,
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    weight_decay: float,
    use_muon: bool = True,
) -> MuonAdamW:
    """Muon for the matrices inside blocks (AdamW with use_muon=False), AdamW for wte and lm_head.

    AdamW's rates are tuned at width 768 and scaled by (width/768)^-0.5. Weight decay acts on the matrices alone:
    rows of the embedding are seen rarely, and would decay at the same rate as those seen always.
    """
    names = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wte, head = names.pop("transformer.wte.weight"), names.pop("lm_head.weight")
    width_factor = (wte.size(1) / 768) ** -0.5
    adamw = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    matrices: dict[str, Any] = {"params": list(names.values()), "names": list(names), "weight_decay": weight_decay}
    if use_muon:
        matrices |= {"kind": "muon", "lr": matrix_lr, "momentum": 0.95, "ns_steps": 5, "beta2": 0.95}
    else:
        lr = matrix_lr * ADAMW_MATRIX_LR * width_factor**2
        matrices |= {"kind": "adamw", "lr": lr, **ADAMW_FOR_MATRICES}
    return MuonAdamW(
        [
            {**adamw, "params": [head], "names": ["lm_head.weight"], "lr": unembedding_lr * width_factor},
            {**adamw, "params": [wte], "names": ["transformer.wte.weight"], "lr": embedding_lr * width_factor},
            matrices,
        ]
    )
