"""Growing buffers hold what concatenation would, and copy only what is new."""

from __future__ import annotations

import torch

from tokenthrift.ops.growing import Growing


def test_rows_are_the_concatenation_of_all_that_came():
    made, buffer, parts = torch.Generator().manual_seed(0), Growing(), []
    for count in (3, 1, 500, 1, 1, 700, 2):
        parts.append(torch.randn(2, 3, count, 4, generator=made))
        assert torch.equal(buffer.append(parts[-1]), torch.cat(parts, dim=2))
    assert len(buffer) == 1208


def test_appending_writes_in_place_until_the_room_is_used_up():
    buffer = Growing()
    first = buffer.append(torch.zeros(1, 2, 10, 4))
    places = {buffer.append(torch.ones(1, 2, 1, 4)).data_ptr() for _ in range(64)}
    assert places == {first.data_ptr()}
    assert buffer.holds(first)
    assert not buffer.holds(first.clone())
    assert not buffer.holds(first[:, :1])
    copies = 0
    for _ in range(3000):
        place = buffer.rows.data_ptr()
        copies += buffer.append(torch.ones(1, 2, 1, 4)).data_ptr() != place
    assert copies <= 28  # 64 rows up to 512, then an eighth more at a time


def test_what_was_cut_is_written_over():
    buffer = Growing()
    buffer.append(torch.arange(12.0).view(1, 6, 2))
    buffer.cut(2)
    assert torch.equal(buffer.append(-torch.ones(1, 1, 2)), torch.tensor([[[0.0, 1], [2, 3], [-1, -1]]]))


def test_rows_made_in_inference_mode_grow_outside_of_it():
    buffer = Growing()
    with torch.inference_mode():
        buffer.append(torch.ones(1, 2, 3))
    assert buffer.append(torch.zeros(1, 1, 3)).shape == (1, 3, 3)
