import pytest
import torch

from nanochat import hardware


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA B200", 2250e12),
     ("NVIDIA GB200", 2500e12),
     ("NVIDIA H200 NVL", 835e12), ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12),
     ("NVIDIA A10G", 70e12), ("NVIDIA A10", None), ("NVIDIA H20", None), ("Tesla V100-SXM2-16GB", None)],
)  # fmt: skip
def test_peak_is_of_the_real_card(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert hardware.peak_flops(torch.device("cuda")) == peak


def test_no_peak_is_made_up_for_a_cpu():
    assert hardware.peak_flops(torch.device("cpu")) is None


def test_memory_peaks_are_in_gib():
    # the peak RSS of this very process: more than torch alone takes, less than a machine has
    (allocated,) = hardware.memory_metrics(torch.device("cpu")).values()
    assert 0.05 < allocated < 1000


def test_every_card_of_the_table_is_found_by_its_name():
    for key, gpu in hardware.GPUS.items():
        assert hardware.find_gpu(f"NVIDIA {key} 80GB") == gpu


def test_facts_about_this_machine_are_there(tmp_path):
    facts = hardware.software()
    assert facts["torch"][0].isdigit() and facts["python"].startswith("3.")
    assert hardware.git(tmp_path) is None
