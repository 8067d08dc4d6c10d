"""The curve over sizes: a known law is found again, seeds are averaged, and two sizes are no fit."""

import json

import pytest

from benchmarks.scaling import Settings, fit, main, points
from nanochat.errors import UserError


def record(arch, depth, bpb, seed=42):
    return {"run": f"--arch={arch} --depth={depth} --seed={seed}", "tokens": 1000, "FLOPs": 1e14 * depth**3, "bpb": bpb}


def test_a_power_law_is_found_again(tmp_path, capsys):
    records = [record("nanochat", depth, 1.5 * (1e14 * depth**3 / 1e15) ** -0.1) for depth in (12, 6, 20)]
    records += [record("ngram", depth, 1.2 + 0.01 * seed, seed) for depth in (6, 12, 20) for seed in (-1, 1)]
    found = points(records)
    assert [size[1:] for size in found] == [(arch, depth) for arch in ("nanochat", "ngram") for depth in (6, 12, 20)]
    assert found[1000, "ngram", 12].bpb == pytest.approx(1.2) and found[1000, "ngram", 12].seeds == 2
    assert fit(list(found.values())[:3]) == pytest.approx((1.5, 0.1, 0), abs=1e-9)
    with pytest.raises(UserError, match="three sizes"):
        fit(list(found.values())[:2])
    records.append({**record("ngram", 6, 1.1), "tokens": 2000})  # one size: a point, no law
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    main(Settings(runs=tmp_path / "runs.jsonl", svg=tmp_path / "curve.svg"))
    out = capsys.readouterr().out
    assert "1.500 (FLOPs / 1e15)^-0.1000, off by 0.0% at most" in out and out.count("FLOPs / 1e15") == 2
    assert "| 2,000 | ngram | 6 |" in out
    assert "1,000 tokens" in (tmp_path / "curve.svg").read_text()
