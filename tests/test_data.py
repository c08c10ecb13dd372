"""Archives, splits, tasks, glyphs."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalib.data import glyphs, omniglot, splits, tasks
from metalib.data.omniglot import ARCHIVES, DRAWERS, Characters
from metalib.randomness import generator

FEW = glyphs.Glyphs(background=3, evaluation=2, characters=4, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("glyphs")
    glyphs.write(place, FEW)
    return place


def characters(count: int = 60, background: int = 40, each: int = 4) -> Characters:
    """Made-up characters, `each` to an alphabet; image (c, d) holds c and d in its corner."""
    images = np.zeros((count, DRAWERS, 28, 28), np.uint8)
    images[:, :, 0, 0] = np.arange(count)[:, None] + 1
    images[:, :, 0, 1] = np.arange(DRAWERS) + 1
    alphabets = np.array([f"A{c // each:03}" for c in range(count)])
    names = np.array([f"character{c % each + 1:02}" for c in range(count)])
    return Characters(images, alphabets, names, np.arange(count) < background, "glyphs", "28 px nearest")


# ------------------------------------------------------------------------------------------------ archives and glyphs


def test_glyphs_are_deterministic_and_depend_on_the_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    glyphs.write(tmp_path, FEW)
    glyphs.write(tmp_path / "other", glyphs.Glyphs(background=3, evaluation=2, characters=4, seed=1))
    for name in ARCHIVES:
        assert (tmp_path / f"{name}.zip").read_bytes() == (folder / f"{name}.zip").read_bytes()
        assert (tmp_path / "other" / f"{name}.zip").read_bytes() != (folder / f"{name}.zip").read_bytes()


def read(folder: Path, size: int = 28) -> Characters:
    digests = {name: omniglot.content_digest(folder / f"{name}.zip") for name in ARCHIVES}
    return omniglot.read((folder / f"{ARCHIVES[0]}.zip", folder / f"{ARCHIVES[1]}.zip"), digests, "glyphs", size, "nearest")


def test_archives_become_one_array_in_a_fixed_order(folder: Path) -> None:
    data = read(folder)
    assert data.images.shape == (20, 20, 28, 28) and data.images.dtype == np.uint8
    assert set(np.unique(data.images)) == {0, 255}
    assert 0.02 < (data.images > 0).mean() < 0.3  # ink is the rarer value
    assert data.background.tolist() == [True] * 12 + [False] * 8
    order = list(zip(~data.background, data.alphabets, data.characters, strict=True))
    assert order == sorted(order)


def test_drawers_agree_more_with_themselves_than_characters_do(folder: Path) -> None:
    images = read(folder).images.reshape(20, 20, -1) / 255.0
    means = images.mean(1)
    to_own = ((images - means[:, None]) ** 2).sum(-1).mean()
    to_others = ((images[:, None] - means[None, :, None]) ** 2).sum(-1).mean()
    assert to_own < 0.75 * to_others


def test_digest_is_of_the_content_not_of_the_zip(folder: Path, tmp_path: Path) -> None:
    name = ARCHIVES[1]
    with zipfile.ZipFile(folder / f"{name}.zip") as old, zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as new:
        for member in reversed(old.namelist()):
            new.writestr(member, old.read(member), zipfile.ZIP_DEFLATED)
    assert omniglot.content_digest(tmp_path / f"{name}.zip") == omniglot.content_digest(folder / f"{name}.zip")


def test_truncated_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "images_evaluation.zip").read_bytes()
    broken = tmp_path / "images_evaluation.zip"
    for part in (whole[: len(whole) // 2], b"", b"<html>not found</html>"):
        broken.write_bytes(part)
        with pytest.raises(ValueError, match=r"images_evaluation\.zip is not a whole zip archive"):
            omniglot.content_digest(broken)


@pytest.mark.parametrize("member", [
    "../evil.png",
    "/etc/evil.png",
    "images_evaluation/../../character01/0001_01.png",
    "images_evaluation/..\\Latin/character01/0001_01.png",
    "images_background/Latin/character01/0001_01.png",
    "images_evaluation/Latin/character01/0001_01.txt",
])  # fmt: skip
def test_foreign_paths_are_refused(tmp_path: Path, member: str) -> None:
    archive = tmp_path / "images_evaluation.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(member, b"")
    with pytest.raises(ValueError, match="is not of the form images_evaluation/<Alphabet>/characterNN"):
        omniglot.content_digest(archive)
    assert list(tmp_path.iterdir()) == [archive]


def test_another_content_is_refused_with_both_digests(folder: Path) -> None:
    archives = (folder / "images_background.zip", folder / "images_evaluation.zip")
    found = omniglot.content_digest(archives[0])
    with pytest.raises(ValueError, match=rf"images_background\.zip: .*{found}.*{omniglot.DIGESTS['images_background']}"):
        omniglot.read(archives, omniglot.DIGESTS, "omniglot", 28, "nearest")


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("scheme", ["characters", "alphabets"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_character_is_on_two_sides(scheme: str, seed: int) -> None:
    data = characters()
    split = splits.Split(scheme=scheme, seed=seed, validation=7, test=15)  # type: ignore[arg-type]
    train, validation, test = splits.divide(data, split)
    assert sorted([*train, *validation, *test]) == list(range(60))
    assert all((np.diff(part) > 0).all() for part in (train, validation, test))
    if scheme == "characters":
        assert (len(validation), len(test)) == (7, 15)
    else:
        assert test.tolist() == list(range(40, 60))
        assert len(validation) == 8  # two whole alphabets of 4
        assert not set(data.alphabets[train]) & set(data.alphabets[validation])
    again = splits.divide(data, split)
    assert all((a == b).all() for a, b in zip(again, (train, validation, test), strict=True))


def test_vinyals_split_of_a_listing_with_omniglots_alphabets() -> None:
    """The rule of the published lists: the last 423 characters are the test, five alphabets the validation."""
    data = characters(1623, 964, 1)._replace(source="omniglot")
    names = data.alphabets.astype("U30")
    start = 100
    for alphabet, size in zip(splits.VINYALS_VALIDATION, (41, 46, 22, 22, 41), strict=True):
        names[start : start + size] = alphabet
        start += size
    train, validation, test = splits.divide(
        data._replace(alphabets=names), splits.Split(scheme="vinyals", seed=0, validation=1, test=1)
    )
    assert (len(train), len(validation), len(test)) == (1028, 172, 423)
    assert sorted([*train, *validation, *test]) == list(range(1623))
    assert test.tolist() == list(range(1200, 1623))


def test_splits_that_cannot_be_are_refused() -> None:
    data = characters()
    with pytest.raises(ValueError, match=r"split.validation 50 and split.test 10 leave none of 60"):
        splits.divide(data, splits.Split(scheme="characters", seed=0, validation=50, test=10))
    with pytest.raises(ValueError, match=r"split.validation 40 leaves no background alphabet"):
        splits.divide(data, splits.Split(scheme="alphabets", seed=0, validation=40, test=1))
    with pytest.raises(ValueError, match=r"vinyals names alphabets of Omniglot, but data.source is glyphs"):
        splits.divide(data, splits.Split(scheme="vinyals", seed=0, validation=1, test=1))


# ------------------------------------------------------------------------------------------------ tasks


@settings(max_examples=30, deadline=None)
@given(
    way=st.integers(1, 12), shot=st.integers(1, 5), query=st.integers(1, 15),
    rotations=st.sampled_from(["classes", "tasks", "none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_tasks_are_few_shot_tasks(way: int, shot: int, query: int, rotations: tasks.Rotations, seed: int) -> None:
    pool = torch.arange(30, 42)

    def draw() -> tasks.Tasks:
        random = generator(seed, "test")
        return tasks.draw(5, pool, way=way, images=shot + query, drawers=DRAWERS, rotations=rotations, generators=[random])

    drawn = draw()
    assert drawn.classes.shape == drawn.rotations.shape == (5, way) and drawn.images.shape == (5, way, shot + query)
    assert set(drawn.classes.flatten().tolist()) <= set(pool.tolist())  # rotated copies stay on their side
    for t in range(5):
        classes = [(int(c), int(r) if rotations == "classes" else 0) for c, r in zip(*(p[t] for p in drawn[::2]), strict=True)]
        assert len(set(classes)) == way
        for c in range(way):  # support and query images of a class are all different drawings
            assert len(set(drawn.images[t, c].tolist())) == shot + query
    assert all(torch.equal(a, b) for a, b in zip(drawn, draw(), strict=True))
    if rotations == "none":
        assert not drawn.rotations.any()


@pytest.mark.parametrize("rotations", ["classes", "tasks", "none"])
def test_tasks_of_several_generators_are_those_of_each_alone(rotations: tasks.Rotations) -> None:
    """Twice in turn. Seen failing with one generator's numbers for all, and with a draw from them in another order."""

    def draw(randoms: list[torch.Generator]) -> tasks.Tasks:
        return tasks.draw(3, torch.arange(12), way=5, images=4, drawers=DRAWERS, rotations=rotations, generators=randoms)

    together, alone = ([generator(seed, "test") for seed in (1, 2)] for _ in range(2))
    for _ in range(2):
        separate = [draw([random]) for random in alone]
        for joined, *parts in zip(draw(together), *separate, strict=True):
            assert torch.equal(joined, torch.cat(parts))


def test_gathered_images_are_the_ones_drawn_and_turned_as_a_class() -> None:
    data = characters()
    images = torch.from_numpy(data.images)
    drawn = tasks.draw(
        6, torch.arange(60), way=5, images=4, drawers=DRAWERS, rotations="tasks", generators=[generator(0, "test")]
    )
    batch = tasks.gather(images, drawn, shot=1)
    assert batch.support_x.shape == (6, 5, 1, 28, 28) and batch.query_x.shape == (6, 15, 1, 28, 28)
    assert set(drawn.rotations.flatten().tolist()) == {0, 1, 2, 3}
    for t in range(6):
        for c in range(5):
            upright = [images[drawn.classes[t, c], d] for d in drawn.images[t, c]]
            expected = [torch.rot90(image, int(drawn.rotations[t, c])).float() / 255 for image in upright]
            support = batch.support_x[t, batch.support_y[t] == c, 0]
            query = batch.query_x[t, batch.query_y[t] == c, 0]
            assert torch.equal(torch.cat([support, query]), torch.stack(expected))
    assert batch.classes is not None and torch.equal(batch.classes, 4 * drawn.classes + drawn.rotations)


def test_support_sets_run_shot_by_shot() -> None:
    """So that any five images in a row of a five-way support set are one of each class."""
    images = torch.zeros(60, DRAWERS, 8, 8, dtype=torch.uint8)
    drawn = tasks.draw(
        2, torch.arange(60), way=5, images=7, drawers=DRAWERS, rotations="none", generators=[generator(0, "test")]
    )
    batch = tasks.gather(images, drawn, shot=4)
    assert batch.support_y.tolist() == [list(range(5)) * 4] * 2 and batch.query_y.tolist() == [list(range(5)) * 3] * 2


def test_rotated_classes_are_four_times_as_many() -> None:
    drawn = tasks.draw(
        1, torch.arange(3), way=12, images=1, drawers=DRAWERS, rotations="classes", generators=[generator(0, "test")]
    )
    pairs = set(zip(drawn.classes[0].tolist(), drawn.rotations[0].tolist(), strict=True))
    assert pairs == {(c, r) for c in range(3) for r in range(4)}


def test_tasks_that_cannot_be_are_refused() -> None:
    ask = {"drawers": DRAWERS, "generators": [generator(0, "test")]}
    with pytest.raises(ValueError, match="way: 20 classes in a task, but there are only 10"):
        tasks.draw(1, torch.arange(10), way=20, images=2, rotations="none", **ask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="way: 50 classes in a task, but there are only 40"):
        tasks.draw(1, torch.arange(10), way=50, images=2, rotations="classes", **ask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shot \\+ query: 21 images of a class, but each has only 20"):
        tasks.draw(1, torch.arange(10), way=5, images=21, rotations="none", **ask)  # type: ignore[arg-type]
