"""What a measurement in a process of its own is told, and what is heard of it."""

import json
import subprocess

import pytest

from jaxsim.bench import apart


def test_a_process_is_alone_and_is_heard(tmp_path):
    """`serve` of a module, with one thread of XLA and no programs of former runs; its last message counts."""
    (tmp_path / "asked.py").write_text(
        "import os\nfrom jaxsim.bench.apart import say\n"
        "def serve(*words):\n    print('noise')\n    say({})\n    say({'words': words, **os.environ})\n")
    environment = apart.environment()
    environment["PYTHONPATH"] += f":{tmp_path}"
    done = subprocess.run(apart.pinned(0, "asked", "one", "2"), env=environment, stdout=subprocess.PIPE, text=True,
                          check=True)
    heard = apart.said(done.stdout)
    assert heard["words"] == ["one", "2"] and heard["JAX_ENABLE_COMPILATION_CACHE"] == "false"
    assert "intra_op_parallelism_threads=1" in heard["XLA_FLAGS"]
    assert apart.said("noise\n") is None


def test_who_says_nothing_has_a_status():
    assert apart.apart("json", "x") == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_a_suite_ends_with_json_or_a_table(capsys, as_json):
    assert apart.printed({"x": 1}, as_json, lambda report: print("table of", *report)) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"x": 1} if as_json else out == "table of x\n"
