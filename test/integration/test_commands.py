"""The commands `demo` and `generate` on NxDI."""

from support import nxdi

nxdi.require_nxdi()

from nxdi_deepseek.checkpoint.synthetic import write_checkpoint  # noqa: E402
from nxdi_deepseek.cli import main  # noqa: E402
from nxdi_deepseek.example_configs import DEMO_CONFIG  # noqa: E402


def test_demo_matches_hugging_face(capsys):
    nxdi.init_cpu_parallel()
    assert main(["demo", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("backend: NxDI")
    assert "As soon as breakfast was over, Jane Fairfax was" in out
    assert "top-1 agreement with Hugging Face: 32 of 32" in out


def test_generate_prints_every_sequence(capsys, tmp_path):
    nxdi.init_cpu_parallel()
    write_checkpoint(tmp_path, DEMO_CONFIG)
    prompts = ["--prompt-ids", "5,17,42", "--prompt-ids", "7,8"]
    assert main(["generate", str(tmp_path), *prompts, "--max-new-tokens", "6", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split()) for line in lines if line.startswith("[")] == [7, 7]
