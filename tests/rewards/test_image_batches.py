"""Pictures prepared for scorers: as the official packages do it, once, in threads, in order."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffagent.rewards import image_batches, official
from diffagent.rewards.image_batches import Preparation, load_pictures

official.install()

SIZES = [(64, 64), (90, 40), (40, 90), (33, 32), (32, 32), (300, 200)]
CROP = Preparation((32, 32), "shortest")
PAD = Preparation((32, 32), "hps")


def picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values, mode="RGB")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_open_clips_modes_are_its_own_transforms(size, mode):
    from open_clip.transform import image_transform

    transform = image_transform(32, is_train=False, resize_mode=mode, mean=(0,) * 3, std=(1,) * 3)
    pixels = Preparation((32, 32), mode)(picture(*size))
    assert pixels.dtype == np.uint8
    torch.testing.assert_close(torch.tensor(pixels) / 255, transform(picture(*size)))


@pytest.mark.parametrize("size", SIZES)
def test_hps_mode_is_hpsv2s_transform(size):
    from hpsv2.src.open_clip.transform import image_transform

    theirs = image_transform(
        32, is_train=False, resize_longest_max=True, mean=(0.0,) * 3, std=(1.0,) * 3
    )(picture(*size))
    torch.testing.assert_close(torch.tensor(PAD(picture(*size))), theirs, atol=2e-6, rtol=0)


def test_a_picture_that_is_all_length_keeps_a_row_where_the_package_has_none_left():
    assert PAD(picture(1000, 3)).any()


def test_image_reward_wants_what_clip_wants():
    from ImageReward.ImageReward import _transform

    for size in SIZES:
        theirs = _transform(32)(picture(*size))
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        ours = (torch.tensor(CROP(picture(*size))) / 255 - mean) / std
        torch.testing.assert_close(ours, theirs)


def test_batches_come_in_order_with_each_picture_resized_once(tmp_path, monkeypatch):
    files = []
    for number, size in enumerate(SIZES):
        files.append(tmp_path / f"{number}.png")
        picture(*size).save(files[-1])
    opened: list[Path] = []
    threads: set[str] = set()
    real = Image.open

    def record(path):
        opened.append(path)
        threads.add(threading.current_thread().name)
        return real(path)

    monkeypatch.setattr(Image, "open", record)
    batches = list(load_pictures(files, [CROP, PAD, CROP], batch_size=4, threads=2))
    assert sorted(opened) == files, "each decoded once, although three scorers want it"
    assert all(name.startswith("pictures") for name in threads)
    assert [list(batch.numbers) for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    for batch in batches:
        assert set(batch.pixels) == {CROP, PAD}
        for row, number in enumerate(batch.numbers):
            for want in (CROP, PAD):
                expected = want(picture(*SIZES[number]))
                assert np.array_equal(batch.pixels[want][row].numpy(), expected)


def test_an_unreadable_picture_is_a_failure_and_not_the_end(tmp_path):
    good, cut, text = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "text.png"
    picture(64, 64).save(good)
    cut.write_bytes(good.read_bytes()[:500])
    text.write_text("<html>")
    files = [good, cut, text, tmp_path / "gone.png"]
    (batch,) = load_pictures(files, [CROP], batch_size=8, threads=1)
    assert sorted(batch.failures) == [1, 2, 3]
    assert all(why.startswith("unreadable-picture: ") for why in batch.failures.values())
    assert not batch.pixels[CROP][1:].any() and batch.pixels[CROP][0].any()


def test_no_more_is_decoded_than_a_reader_is_given_time_for(monkeypatch):
    """Memory stays bounded however many pictures there are, also for a reader that gives up."""
    done = []
    monkeypatch.setattr(image_batches, "_fill", lambda source, rows: done.append(source) or "")
    reader = load_pictures([picture(8, 8)] * 100, [CROP], batch_size=2, threads=1)
    next(reader)
    reader.close()
    assert len(done) <= 2 * (image_batches.AHEAD + 1)


def test_alpha_is_dropped_and_other_modes_are_converted():
    image = picture(64, 64)
    rgba = image.copy()
    rgba.putalpha(100)
    assert np.array_equal(CROP(rgba), CROP(image))
    assert np.array_equal(PAD(rgba), PAD(image))
    assert CROP(image.convert("L")).shape == (3, 32, 32)
