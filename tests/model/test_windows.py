import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swin_hf.model.attention import kept
from swin_hf.model.resizing import (
    channel_matrix,
    resample_patches,
    resize_bias_table,
    resize_position_embeddings,
)
from swin_hf.model.windows import (
    cyclic_shift,
    pad_to_windows,
    padding_mask,
    region_map,
    relative_coordinates,
    relative_position_index,
    shift_mask,
    window_geometry,
    window_mask,
    window_partition,
    window_reverse,
)

SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12))
WINDOWS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@pytest.mark.parametrize(
    ("grid", "window", "per_axis", "expected_window", "shift", "padded"),
    [
        ((56, 56), (7, 7), False, (7, 7), (3, 3), (56, 56)),
        ((58, 50), (7, 7), False, (7, 7), (3, 3), (63, 56)),
        ((7, 7), (7, 7), False, (7, 7), (0, 0), (7, 7)),  # the last stage of Swin-T at 224
        ((8, 7), (7, 7), False, (7, 7), (0, 0), (14, 7)),  # Microsoft: one axis covered, no shift at all
        ((8, 7), (7, 7), True, (7, 7), (3, 0), (14, 7)),  # timm and torchvision: each axis by itself
        ((20, 3), (7, 7), False, (7, 3), (0, 0), (21, 3)),
        ((20, 3), (7, 7), True, (7, 3), (3, 0), (21, 3)),
        ((6, 24), (4, 3), False, (4, 3), (2, 1), (8, 24)),
    ],
)
def test_geometry_follows_the_two_rules(grid, window, per_axis, expected_window, shift, padded):
    geometry = window_geometry(grid, window, True, shift_per_axis=per_axis)
    assert (geometry.window, geometry.shift, geometry.padded) == (expected_window, shift, padded)
    assert window_geometry(grid, window, False, shift_per_axis=per_axis).shift == (0, 0)


def test_always_partition_pads_instead_of_shrinking():
    geometry = window_geometry((3, 20), (7, 7), True, always_partition=True)
    assert (geometry.window, geometry.shift, geometry.padded) == ((7, 7), (3, 3), (7, 21))
    assert geometry.num_windows == (1, 3)
    assert geometry.area == 49


@given(grid=SIDES, window=WINDOWS, shifted=st.booleans(), per_axis=st.booleans(), always=st.booleans())
def test_geometry_always_holds_the_map(grid, window, shifted, per_axis, always):
    geometry = window_geometry(grid, window, shifted, shift_per_axis=per_axis, always_partition=always)
    for axis in range(2):
        assert geometry.padded[axis] % geometry.window[axis] == 0
        assert 0 <= geometry.padded[axis] - grid[axis] < geometry.window[axis]
        assert 0 <= geometry.shift[axis] < geometry.window[axis]
        assert geometry.window[axis] == (window[axis] if always else min(window[axis], grid[axis]))


@given(grid=SIDES, window=WINDOWS, data=st.data())
def test_windows_go_and_come_back(grid, window, data):
    geometry = window_geometry(grid, window, True, shift_per_axis=data.draw(st.booleans()))
    x = torch.randn(2, *grid, 3)
    padded = pad_to_windows(x, geometry)
    assert padded.shape == (2, *geometry.padded, 3)
    assert padded.count_nonzero() == x.count_nonzero()
    windows = window_partition(cyclic_shift(padded, geometry.shift), geometry.window)
    assert windows.shape == (2 * geometry.num_windows[0] * geometry.num_windows[1], geometry.area, 3)
    back = window_reverse(windows, geometry.window, geometry.padded)
    back = cyclic_shift(back, (-geometry.shift[0], -geometry.shift[1]))
    assert torch.equal(back[:, : grid[0], : grid[1]], x)


def test_windows_are_in_row_major_order():
    x = torch.arange(24).view(1, 4, 6, 1)
    windows = window_partition(x, (2, 3))
    assert windows[:, :, 0].tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


def test_partition_of_a_map_that_does_not_divide_says_what_to_pad_to():
    with pytest.raises(ValueError, match="window 7x5 does not divide the map 8x9; pad it to 14x10"):
        window_partition(torch.zeros(1, 8, 9, 2), (7, 5))


def test_regions_are_those_of_figure_4():
    assert region_map((8, 8), (4, 4), (2, 2)).tolist() == [
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [0, 0, 0, 0, 1, 1, 2, 2],
        [3, 3, 3, 3, 4, 4, 5, 5],
        [3, 3, 3, 3, 4, 4, 5, 5],
        [6, 6, 6, 6, 7, 7, 8, 8],
        [6, 6, 6, 6, 7, 7, 8, 8],
    ]


@given(grid=SIDES, window=WINDOWS, per_axis=st.booleans())
def test_mask_separates_exactly_what_the_roll_brought_together(grid, window, per_axis):
    """Definition by hand: two tokens of a rolled window are neighbours if neither axis wrapped between them."""
    geometry = window_geometry(grid, window, True, shift_per_axis=per_axis)
    (height, width), (rows, columns), (down, right) = geometry.padded, geometry.window, geometry.shift
    mask = shift_mask(geometry)
    for index, row in enumerate(range(0, height, rows)):
        for column in range(0, width, columns):
            number = index * (width // columns) + column // columns
            positions = [(row + r + down, column + c + right) for r in range(rows) for c in range(columns)]
            for query, (query_row, query_column) in enumerate(positions):
                for key, (key_row, key_column) in enumerate(positions):
                    together = (query_row >= height) == (key_row >= height) and (query_column >= width) == (
                        key_column >= width
                    )
                    assert mask[number, query, key] == (0 if together else -100)


def test_padding_mask_marks_the_appended_tokens():
    geometry = window_geometry((3, 5), (2, 3), True)
    marked = cyclic_shift(torch.ones(1, 4, 6, 1) - pad_to_windows(torch.ones(1, 3, 5, 1), geometry), geometry.shift)
    expected = window_partition(marked, (2, 3))[:, None, :, 0].bool()
    assert torch.equal(padding_mask(geometry), expected)
    assert padding_mask(geometry).sum() == 4 * 6 - 3 * 5


def test_relative_coordinates_are_query_minus_key():
    coordinates = relative_coordinates((2, 3))
    assert coordinates.shape == (6, 6, 2)
    assert coordinates[0, 5].tolist() == [-1, -2]
    assert coordinates[4, 2].tolist() == [1, -1]


@given(window=WINDOWS, larger=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_index_gives_each_offset_its_own_row(window, larger):
    table = (window[0] + larger[0], window[1] + larger[1])
    index = relative_position_index(window, table)
    rows = {}
    for query in range(window[0] * window[1]):
        for key in range(window[0] * window[1]):
            offset = (
                query // window[1] - key // window[1] + table[0] - 1,
                query % window[1] - key % window[1] + table[1] - 1,
            )
            expected = offset[0] * (2 * table[1] - 1) + offset[1]  # Microsoft's formula, written out
            assert index[query, key] == expected
            rows[offset] = expected
    assert len(set(rows.values())) == len(rows)


def test_cached_tensors_serve_training_after_inference():
    """A tensor born in inference mode could not be saved for a backward pass."""
    geometry = window_geometry((9, 11), (5, 4), True)
    with torch.inference_mode():
        like = torch.zeros(1)
        index = kept(relative_position_index, (5, 4), (5, 4), like.device, like=like)
        mask = kept(window_mask, geometry, False, like.dtype, like.device, like=like)
    assert not index.is_inference() and not mask.is_inference()
    assert kept(relative_position_index, (5, 4), (5, 4), like.device, like=torch.zeros(1)) is index
    assert window_mask(window_geometry((9, 11), (5, 4), False), False, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masked_scores_stay_finite(dtype):
    geometry = window_geometry((3, 3), (4, 4), True, always_partition=True)
    mask = window_mask(geometry, True, dtype)
    assert mask.dtype == dtype and mask.isfinite().all()
    assert (mask + mask / 4).isfinite().all()


@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((12, 12), (7, 7)), ((4, 6), (5, 3)), ((1, 2), (3, 3))])
def test_bicubic_is_microsofts_loader(old, new):
    table = torch.randn((2 * old[0] - 1) * (2 * old[1] - 1), 3)
    maps = table.permute(1, 0).view(1, 3, 2 * old[0] - 1, 2 * old[1] - 1)
    expected = F.interpolate(maps, size=(2 * new[0] - 1, 2 * new[1] - 1), mode="bicubic")
    expected = expected.view(3, -1).permute(1, 0)
    torch.testing.assert_close(resize_bias_table(table, old, new), expected)


# float32 tables and a spline in float64: only the rounding of the result is left.
@pytest.mark.parametrize(("old", "new"), [(7, 12), (6, 7), (6, 14), (12, 24)])
def test_geometric_is_simmims_with_scipy(old, new):
    """The loader of SimMIM, with the spline that its interp2d (gone from SciPy 1.14) was made of."""
    from scipy.interpolate import RectBivariateSpline

    table = torch.randn((2 * old - 1) ** 2, 2, generator=torch.Generator().manual_seed(0))
    low, high = 1.01, 1.5
    while high - low > 1e-9:
        ratio = (low + high) / 2
        if (1 - ratio ** (old - 1)) / (1 - ratio) > new - 1:
            high = ratio
        else:
            low = ratio
    half = np.cumsum(ratio ** np.arange(old - 1))
    knots, targets = np.concatenate([-half[::-1], [0], half]), np.arange(1 - new, new)
    expected = []
    for head in range(2):
        values = table[:, head].view(2 * old - 1, 2 * old - 1).double().numpy()
        expected.append(RectBivariateSpline(knots, knots, values)(targets, targets).reshape(-1))
    ours = resize_bias_table(table, (old, old), (new, new), method="geometric")
    np.testing.assert_allclose(ours.numpy(), np.stack(expected, axis=1), atol=1e-5)


def test_geometric_to_a_smaller_window_keeps_the_offsets():
    table = torch.randn(15 * 15, 2)
    smaller = resize_bias_table(table, (8, 8), (3, 4), method="geometric")
    torch.testing.assert_close(smaller.view(5, 7, 2), table.view(15, 15, 2)[5:10, 4:11])


@pytest.mark.parametrize("method", ["bicubic", "geometric"])
@given(old=WINDOWS, new=WINDOWS)
@settings(max_examples=30)
def test_a_constant_table_stays_constant(method, old, new):
    table = torch.full(((2 * old[0] - 1) * (2 * old[1] - 1), 2), 0.7, dtype=torch.float16)
    resized = resize_bias_table(table, old, new, method)
    assert resized.shape == ((2 * new[0] - 1) * (2 * new[1] - 1), 2) and resized.dtype == torch.float16
    torch.testing.assert_close(resized, torch.full_like(resized, 0.7), atol=1e-3, rtol=0)


def test_a_table_of_another_window_is_refused():
    with pytest.raises(ValueError, match="the bias table has 10 rows; a window of 2x3 has 15"):
        resize_bias_table(torch.zeros(10, 1), (2, 3), (4, 4))
    with pytest.raises(ValueError, match="unknown method 'linear'; choose 'bicubic' or 'geometric'"):
        resize_bias_table(torch.zeros(15, 1), (2, 3), (4, 4), method="linear")


def test_position_embeddings_are_interpolated_as_maps():
    embeddings = torch.randn(1, 4 * 6, 5)
    assert torch.equal(resize_position_embeddings(embeddings, (4, 6), (4, 6)).flatten(1, 2), embeddings)
    expected = F.interpolate(embeddings.view(1, 4, 6, 5).permute(0, 3, 1, 2), size=(7, 3), mode="bicubic")
    resized = resize_position_embeddings(embeddings, (4, 6), (7, 3))
    torch.testing.assert_close(resized.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("new", [(8, 8), (6, 5)])
def test_resampled_patches_answer_enlarged_images_as_before(new):
    kernel, patches = torch.randn(6, 3, 4, 4), torch.randn(5, 3, 4, 4)
    enlarged = F.interpolate(patches, size=new, mode="bicubic")
    resampled = resample_patches(kernel, new)
    torch.testing.assert_close(F.conv2d(enlarged, resampled), F.conv2d(patches, kernel), atol=1e-5, rtol=1e-5)
    assert resample_patches(kernel, (4, 4)) is kernel


@pytest.mark.parametrize("new", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("old", [1, 3, 4])
def test_channels_keep_the_answer_to_grey(old, new):
    kernel, grey = torch.randn(4, old, 2, 2), torch.randn(3, 1, 2, 2)
    adapted = torch.einsum("oihw,ni->onhw", kernel, channel_matrix(old, new))
    expected = F.conv2d(grey.expand(-1, old, -1, -1), kernel)
    torch.testing.assert_close(F.conv2d(grey.expand(-1, new, -1, -1), adapted), expected, atol=1e-5, rtol=1e-5)


def test_channel_rule_is_the_one_that_is_stated():
    assert channel_matrix(1, 3).tolist() == [[pytest.approx(1 / 3)]] * 3
    assert channel_matrix(3, 1).tolist() == [[1, 1, 1]]
    assert channel_matrix(3, 5).tolist() == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1], [0.5, 0, 0], [0, 0.5, 0]]
