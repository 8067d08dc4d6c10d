"""The benchmark of the training step, as far as a CPU can tell."""

import json
import shlex

import pytest

from benchmarks import train_speed
from nanochat import cli
from nanochat.config import build_config, resolve
from nanochat.errors import UserError


@pytest.mark.parametrize("line", train_speed.SUITE)
def test_the_suite_is_made_of_flags(line):
    settings = resolve(cli.parse(train_speed.Settings, shlex.split(line)))
    assert build_config(settings, settings.vocab_size, document_token=0).n_layer == settings.depth


def test_kernels_are_told_apart():
    times = {
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN": 5.0,
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>": 1.0,
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7": 4.0,
        "triton_poi_fused_pow_relu_3": 3.0,
        "triton_per_fused__to_copy_add_mean_mul_7": 2.0,
        "Memcpy DtoD (Device -> Device)": 0.5,
    }
    assert train_speed.by_class(times) == {
        "products": 6.0, "attention": 4.0, "pointwise": 3.0, "norms and sums": 2.0, "copies": 0.5,
    }  # fmt: skip


def test_a_program_is_started_cold_and_again(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import json, os, pathlib, sys\n"
        "cache = pathlib.Path(os.environ['TORCHINDUCTOR_CACHE_DIR'])\n"
        "cold = not cache.exists()\n"
        "cache.mkdir(exist_ok=True)\n"
        "if 'fail' in sys.argv: sys.exit('error: no such card')\n"
        "out = sys.argv[-1].removeprefix('--out=')\n"
        "pathlib.Path(out).write_text(json.dumps({'first_step_seconds': 40 if cold else 10}))\n"
    )
    found = train_speed.twice([str(script)])
    assert found["first_step_seconds"] == 40 and found["second_start_seconds"] == 10
    assert train_speed.twice([str(script), "fail"])["error"] == "error: no such card"


def test_a_peer_is_measured_with_the_suite(tmp_path):
    with pytest.raises(UserError, match="--suite"):
        train_speed.main(train_speed.Settings(peer=tmp_path))


def test_parts_of_the_suite_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    ran: list[list[str]] = []
    monkeypatch.setattr(train_speed, "twice", lambda words: ran.append(words) or {"error": "not here"})
    out = tmp_path / "speed.json"
    train_speed.main(train_speed.Settings(suite=True, peer=tmp_path, only=r"depth=20$|--peer.*12", out=str(out)))
    assert [words[-2:] for words in ran] == [["--steps=10", "--depth=20"], ["12", "65536"], ["20", "65536"]]
    assert len(json.loads(out.read_text())["runs"]) == 3 and "--peer --depth=12" in capsys.readouterr().out
    with pytest.raises(UserError, match="no regular expression"):
        train_speed.main(train_speed.Settings(suite=True, only="("))
    with pytest.raises(UserError, match="--suite"):
        train_speed.main(train_speed.Settings(only="depth"))
