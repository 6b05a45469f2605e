"""The file jaxsim writes: a round trip changes nothing, strangers are refused."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxsim._core.errors import InputError
from jaxsim.cost.profile import OperatorTable, Profile, interpolate
from jaxsim.profiles import llmservingsim, native, read, write
from tests.profiles.synthetic import layer_files


@pytest.fixture
def profile(tmp_path):
    return llmservingsim.read(*layer_files(tmp_path))


def test_round_trip(profile, tmp_path):
    back = read(write(profile, tmp_path / "p.parquet"))
    assert list(back.tables) == list(profile.tables)
    for name, table in profile.tables.items():
        assert np.array_equal(back.tables[name].points, table.points)
        assert np.array_equal(back.tables[name].seconds, table.seconds)
    for field in ("model", "device", "tensor_parallel_size", "dtype", "provenance"):
        assert getattr(back, field) == getattr(profile, field)
    assert [p.name for p in tmp_path.glob(".*")] == [], "no half-written file is left"


def test_a_place_that_cannot_be_written_is_named(profile, tmp_path):
    with pytest.raises(OSError) as info:
        write(profile, tmp_path / "none" / "p.parquet")
    assert info.value.filename == str(tmp_path / "none" / "p.parquet")


def test_strangers_are_refused(profile, tmp_path):
    path = tmp_path / "other.parquet"
    pd.DataFrame({"operator": ["qkv"], "seconds": [1e-5]}).to_parquet(path)
    with pytest.raises(InputError, match="is not a profile jaxsim wrote"):
        read(path)
    table = pq.read_table(write(profile, path))
    meta = json.loads(table.schema.metadata[native.KEY]) | {"schema_version": 99}
    pq.write_table(table.replace_schema_metadata({native.KEY: json.dumps(meta).encode()}), path)
    with pytest.raises(InputError, match="schema_version = 99"):
        read(path)
    for change, says in (({"model": 3}, "model = 3: should be text"),
                         ({"tensor_parallel_size": "2"}, "should be a whole number"),
                         ({"provenance": None}, "provenance = None: should be a table")):
        broken = json.loads(table.schema.metadata[native.KEY]) | change
        pq.write_table(table.replace_schema_metadata({native.KEY: json.dumps(broken).encode()}), path)
        with pytest.raises(InputError, match=says):
            read(path)
    pq.write_table(table.replace_schema_metadata({native.KEY: b"[1"}), path)
    with pytest.raises(InputError, match="is not a JSON table"):
        read(path)
    pq.write_table(table.drop_columns(["context_tokens"]), path)
    with pytest.raises(InputError, match="context_tokens' ?: is a column this operator needs"):
        read(path)
    frame = table.to_pandas().assign(operator=lambda f: f["operator"].str.replace("qkv", "qvk"))
    pq.write_table(pa.Table.from_pandas(frame).replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputError, match=r"operator = 'qvk': is not known; did you mean 'qkv'"):
        read(path)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "text.parquet")


def test_tables_are_checked():
    with pytest.raises(InputError, match="did you mean 'qkv'"):
        OperatorTable("qkvs", [[1.0]], [1e-5])
    with pytest.raises(InputError, match="holds no measurements"):
        OperatorTable("qkv", np.zeros((0, 1)), [])
    with pytest.raises(InputError, match="holds no tables"):
        Profile({})
    repeated = OperatorTable("qkv", [[1.0], [2.0], [1.0], [1.0]], [1e-5, 2e-5, 3e-5, 2e-5])
    assert repeated.points.tolist() == [[1.0], [2.0]] and repeated.seconds.tolist() == [2e-5, 2e-5]


def test_profiles_of_two_systems_do_not_merge(profile):
    extra = Profile({"router": OperatorTable("router", [[1.0]], [1e-5])})
    assert set(profile.merged(extra).tables) == {*profile.tables, "router"}
    with pytest.raises(InputError, match="does not go with"):
        profile.merged(Profile(dict(extra.tables), device="another"))


def test_interpolation_of_a_ragged_table():
    """Linear inside each slice and between slices; outside, the edge times the ratio of the rate."""
    def rate(x, y):
        return 1.0 + x * y

    points = np.array([(1, 0), (1, 10), (3, 0), (3, 5), (3, 20)], float)
    seconds = np.array([1.0, 2.0, 3.0, 4.0, 7.0])
    found = interpolate(points, seconds, [[1, 2, 3, 6], [5, 10]], rate)
    assert found.seconds[0] == pytest.approx([1.5, 2.0])
    assert found.seconds[2] == pytest.approx([4.0, 5.0])
    assert found.seconds[1] == pytest.approx([2.75, 3.5])
    assert found.seconds[3] == pytest.approx([4 * 31 / 16, 5 * 61 / 31])
    assert np.all(found.outside_s[:3] == 0)
    assert np.array_equal(found.outside_s[3], found.seconds[3])
    past = interpolate(points, seconds, [[1], [20]], rate)
    assert past.seconds.item() == pytest.approx(2.0 * 21 / 11) and past.outside_s.item() == past.seconds.item()
