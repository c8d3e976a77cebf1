"""How a frame and its heads are cut, and put together again."""

import re
from pathlib import Path

import pytest
import torch

import flexkern
from flexkern.model.wan import CONFIGS
from flexkern.parallel.split import Split, fitting_ranks, validate_shares


@pytest.mark.parametrize(("ranks", "rows", "columns"), [(2, 4, 6), (4, 2, 6), (4, 6, 2), (6, 3, 4), (12, 6, 8)])
def test_pieces_make_the_whole(ranks, rows, columns):
    splits = [Split(ranks=ranks, rank=rank, heads=12, rows=rows, columns=columns) for rank in range(ranks)]
    frames = torch.arange(2 * 3 * 2 * rows * 2 * columns * 2).view(2, 3, 2, rows * 2, columns * 2)
    rectangles = torch.stack([split.cut(frames) for split in splits])
    assert torch.equal(splits[0].joined(rectangles), frames)
    places = torch.arange(rows * columns)
    own = torch.stack([split.own_places(places) for split in splits])
    assert own.flatten().sort().values.equal(places)
    tokens = places[None, None, :, None, None].expand(1, 3, -1, 2, 5)
    cut = splits[0].by_places(tokens)
    assert all(torch.equal(cut[rank][0, 0, :, 0, 0], own[rank]) for rank in range(ranks))
    assert torch.equal(splits[0].over_frame(cut).flatten(2, 5), tokens)
    heads = torch.arange(12)[None, None, None, :, None].expand(1, 3, 4, -1, 5)
    by_heads = splits[0].by_heads(heads)
    assert all(torch.equal(by_heads[s.rank][0, 0, 0, :, 0], torch.arange(12)[s.own_heads]) for s in splits)


def test_a_rectangle_is_what_a_row_of_tokens_says_it_is():
    """Tokens of the rectangle of latents are those that ``own_places`` lists."""
    split = Split(ranks=4, rank=2, heads=4, rows=2, columns=6)
    latents = torch.arange(2 * 6).view(1, 1, 1, 2, 6).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert split.cut(latents)[0, 0, 0, ::2, ::2].flatten().tolist() == split.own_places(torch.arange(12)).tolist()


def test_the_numbers_that_work():
    rows, columns = 30, 52
    assert fitting_ranks(heads=12, rows=rows, columns=columns) == [1, 2, 3, 4, 6, 12]
    assert fitting_ranks(heads=40, rows=rows, columns=columns) == [1, 2, 4, 5, 8, 10, 20, 40]
    assert fitting_ranks(heads=40, rows=45, columns=80) == [1, 2, 4, 5, 8, 10, 20, 40]
    message = (
        "--gpus must share 12 heads and the 30x52 tokens of a frame evenly: expected one of 1, 2, 3, 4, 6, 12, got 8"
    )
    with pytest.raises(ValueError, match=message):
        validate_shares(CONFIGS["1.3B"], (60, 104), 8, called="--gpus")


def test_the_page_has_the_arithmetic():
    """Bytes, links, copies and what is gained, of both tables."""
    page = Path(flexkern.__file__).with_name("docs").joinpath("parallel.md").read_text()
    row = r"^\| (\d+) \| ([\d.]+) GB \| (\d+) ms \| (\d+) ms \| (\d+) ms \| (\d+) ms \| ([\d.]+) \| ([\d.]+) \|$"
    rows = [list(map(float, found)) for found in re.findall(row, page, re.M)]
    assert [found[0] for found in rows] == [2, 4, 6, 2, 4, 8]
    for index, (ranks, sent, nvlink, pcie, copies, computing, faster, over_pcie) in enumerate(rows):
        name, tokens, chunk = ("1.3B", 1560, 0.336) if index < 3 else ("14B", 3600, 4.9)
        config, passes = CONFIGS[name], 5
        part = 3 * tokens * config.dim * 2 / ranks * config.num_layers * passes
        bytes_sent, exchanges = 4 * part * (ranks - 1) / ranks, 2 * config.num_layers * passes
        links = [bytes_sent / 350e9 + exchanges * 15e-6, bytes_sent / 45e9 + exchanges * 30e-6]
        packed, alone = 8 * part * 2 / 3e12, chunk / ranks
        assert sent == pytest.approx(bytes_sent / 1e9, abs=0.01)
        assert [nvlink, pcie, copies, computing] == pytest.approx([1e3 * t for t in (*links, packed, alone)], abs=0.6)
        gained = [chunk / (alone + packed + link) for link in links]
        assert [faster, over_pcie] == pytest.approx(gained, abs=0.06)
