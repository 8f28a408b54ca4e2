"""tools/bench.py quantize, on short chains."""

import json
import statistics

import pytest
import torch
from helpers import table_rows

import bench
import bench_quantize


@pytest.fixture(autouse=True)
def small(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(bench_quantize, "NETWORK", "squeezenet1_1")
    yield
    torch.set_num_threads(before)


def test_the_table_and_the_file(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert bench.main(["quantize", "--layers", "2,5", "--rounds", "3", "--json", str(path)]) == 0
    networks = json.loads(path.read_text())["networks"]
    assert {name: found["layers"] for name, found in networks.items()} == {
        "squeezenet1_1": 26,
        "chain of 2": 2,
        "chain of 5": 5,
    }
    for found in networks.values():
        assert len(found["seconds"]) == len(found["cpu_seconds"]) == 3
        median = statistics.median(found["seconds"])
        assert found["seconds_quartiles"][1] == pytest.approx(median)
        assert found["microseconds_per_layer"] == pytest.approx(1e6 * median / found["layers"])
    header, *rows = table_rows(capsys.readouterr().out)
    assert header[0] == "network"
    assert [row[:2] for row in rows] == [["squeezenet1_1", "26"], ["chain of 2", "2"], ["chain of 5", "5"]]


@pytest.mark.parametrize("flags", [["--layers", "0"], ["--bits", "9"], ["--scheme", "log"], ["--rounds", "x"]])
def test_a_mistake_is_one_line(flags, capsys):
    assert bench.main(["quantize", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
