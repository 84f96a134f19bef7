import math

import pytest
import torch

from paragraph_ocr.model.positions import add_grid_positions, sine_code


def slow_sine_code(length, channels):
    code = torch.zeros(length, channels)
    for position in range(length):
        for channel in range(channels):
            rate = 10_000 ** (-(channel // 2 * 2) / channels)
            code[position, channel] = (math.sin, math.cos)[channel % 2](position * rate)
    return code


def test_token_positions_are_those_of_the_slow_loop():
    torch.testing.assert_close(sine_code(50, 12), slow_sine_code(50, 12), atol=1e-5, rtol=0)


def test_grid_positions_code_the_row_in_one_half_and_the_column_in_the_other():
    code = add_grid_positions(torch.zeros(2, 8, 5, 7))
    rows, columns = slow_sine_code(5, 4), slow_sine_code(7, 4)
    for row in range(5):
        for column in range(7):
            expected = torch.cat([rows[row], columns[column]])
            torch.testing.assert_close(code[1, :, row, column], expected, atol=1e-6, rtol=0)


def test_a_cell_keeps_its_position_on_a_larger_canvas():
    small = add_grid_positions(torch.zeros(1, 8, 3, 4))
    large = add_grid_positions(torch.zeros(1, 8, 6, 9))
    assert torch.equal(small, large[:, :, :3, :4])


def test_channels_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError):
        sine_code(4, 3)
    with pytest.raises(ValueError):
        add_grid_positions(torch.zeros(1, 6, 2, 2))
