"""RECORD: what PERFDATA, the machine and a user's own code may rely on."""

from __future__ import annotations

import numpy as np

from spepolicy.spe.records import EXTRA, RECORD, Present, new_records


def test_no_padding_bytes() -> None:
    """Rows compare and hash as bytes only if no byte is left undefined."""
    for dtype in (RECORD, EXTRA):
        assert dtype.itemsize == sum(field[0].itemsize for field in (dtype.fields or {}).values())


def test_a_new_record_says_nothing() -> None:
    records = new_records(3)
    assert records.tobytes() == bytes(3 * RECORD.itemsize)
    assert not (records["present"] & sum(Present)).any()


def test_every_bit_of_present_fits_its_field() -> None:
    bits = [int(bit) for bit in Present]
    assert len(set(bits)) == len(bits)
    assert np.iinfo(RECORD["present"]).max >= sum(bits)
