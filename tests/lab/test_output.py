"""spepolicy.lab.output: complete files or none, and a clear message for a folder that cannot be written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from spepolicy.errors import OutputError
from spepolicy.judge.metrics import METRICS, measure
from spepolicy.judge.tables import Categories, lane_table, window_table
from spepolicy.lab.output import open_folder, stacked, write_file, write_json, write_parquet

from ..judge.hand_made_results import eventful_result


def test_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "a" / "b")
    assert folder.is_absolute()
    assert list(folder.iterdir()) == []


def test_folder_below_a_file_is_refused_with_path_rule_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError) as caught:
        open_folder(tmp_path / "file" / "run")
    message = str(caught.value)
    assert str(tmp_path / "file" / "run") in message
    assert "Not a directory" in message
    assert "output.dir=" in message


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})

    def half(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="No space left on device"):
        write_file(path, half)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "x", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})


def test_stacked_tables_keep_rows_and_texts() -> None:
    first = {"policy": Categories(np.zeros(2, np.int32), ("a",)), "n": np.array([1, 2])}
    second = {"policy": Categories(np.array([1, 0], np.int32), ("a", "b")), "n": np.array([3, 4])}
    table = stacked([first, second])
    policy = table["policy"]
    assert isinstance(policy, Categories)
    assert [policy.names[code] for code in policy.codes] == ["a", "a", "b", "a"]
    assert np.asarray(table["n"]).tolist() == [1, 2, 3, 4]


def test_parquet_is_readable_and_documents_its_metrics(tmp_path: Path) -> None:
    import pyarrow.parquet

    result = eventful_result("by_hand", replicates=(0, 1, 2))
    write_parquet(tmp_path / "lanes.parquet", lane_table(result, measure(result, None)))
    lanes = pyarrow.parquet.read_table(tmp_path / "lanes.parquet")
    assert lanes.num_rows == 3
    assert lanes["policy"].to_pylist() == ["by_hand"] * 3
    assert str(lanes.schema.field("wanted_ps").type) == "int64"
    assert str(lanes.schema.field("blackout_pct").type) == "double"
    field = lanes.schema.field("blackout_pct")
    assert field.metadata == {b"doc": METRICS["blackout_pct"].doc.encode(), b"unit": b"%"}
    assert all(lanes.schema.field(name).metadata for name in METRICS)

    write_parquet(tmp_path / "blackouts.parquet", window_table({"by_hand": result}))
    windows = pyarrow.parquet.read_table(tmp_path / "blackouts.parquet").to_pylist()
    assert len(windows) == 6
    assert windows[0]["cause"] == "stage2_host"
    assert windows[0]["length_us"] == 100_000.0


def test_parquet_without_rows_keeps_its_columns(tmp_path: Path) -> None:
    import pyarrow.parquet

    write_parquet(tmp_path / "blackouts.parquet", window_table({}))
    table = pyarrow.parquet.read_table(tmp_path / "blackouts.parquet")
    assert table.num_rows == 0
    assert {"policy", "cause", "length_us", "missed_samples"} <= set(table.column_names)
