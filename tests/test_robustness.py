"""Corruptions change images as much as they say, and the accuracy is that on corrupted images."""

import numpy as np
import pandas as pd
import pytest
import torch

from dataload import Images
from evaluation import robustness


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A smooth picture: what noise and blur do to it can be computed."""
    rows, columns = np.mgrid[0:1:32j, 0:1:32j]
    return np.uint8(
        np.stack([60 + 120 * rows, 60 + 120 * columns, np.full((32, 32), 120)], axis=-1)
    )


@pytest.mark.numeric
@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_a_stronger_corruption_changes_more_and_the_same_each_time(name):
    images = (
        np.random.default_rng(0)
        .integers(40, 216, (4, 8, 8, 3), dtype=np.uint8)
        .repeat(4, 1)
        .repeat(4, 2)
    )
    changes = [
        np.abs(robustness.corrupt(images, name, s).astype(float) - images).mean()
        for s in (0, 1, 2, 3)
    ]
    assert changes[0] == 0 and changes == sorted(changes) and changes[1] > 1
    assert np.array_equal(robustness.corrupt(images, name, 2), robustness.corrupt(images, name, 2))


@pytest.mark.numeric
def test_noise_has_the_deviation_that_is_said():
    grey = np.full((20, 32, 32, 3), 128, np.uint8)
    for strength, deviation in enumerate(robustness.STRENGTHS["noise"], 1):
        got = (robustness.corrupt(grey, "noise", strength).astype(float) - 128).std() / 255
        assert got == pytest.approx(deviation, rel=0.05)


@pytest.mark.numeric
def test_dark_multiplies_and_so_does_not_clip(image):
    for strength, part in enumerate(robustness.STRENGTHS["dark"], 1):
        got = robustness.corrupt(image[None], "dark", strength)[0].astype(float)
        assert np.abs(got - (1 - part) * image).max() <= 1 and got.min() > 0


@pytest.mark.numeric
def test_contrast_blends_towards_the_mean_of_the_image(image):
    for strength, part in enumerate(robustness.STRENGTHS["contrast"], 1):
        got = robustness.corrupt(image[None], "contrast", strength)[0].astype(float)
        mean = image.mean((0, 1))
        assert np.abs(got - (mean + (1 - part) * (image - mean))).max() <= 0.5001
        assert got.mean() == pytest.approx(image.mean(), abs=0.5)  # as bright as before
        assert got.std((0, 1)) == pytest.approx((1 - part) * image.std((0, 1)), abs=0.5)


@pytest.mark.numeric
def test_jpeg_keeps_red_better_than_blue():
    """Its luma, which is kept best, is 0.299 red + 0.587 green + 0.114 blue."""
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    error = robustness.corrupt(images, "JPEG", 1).astype(float) - images
    red, green, blue = np.square(error).mean((0, 1, 2))
    assert green < red < 0.9 * blue


@pytest.mark.numeric
def test_contrast_by_hand():
    """Half black, half (200, 100, 40).

    The mean is (100, 50, 20). At 0.6 less contrast, 40 % of the distance stays.
    """
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, 16:] = (200, 100, 40)
    assert robustness.STRENGTHS["contrast"] == (0.4, 0.6, 0.8)
    got = robustness.corrupt(image, "contrast", 2)
    assert (got[:, :16] == (60, 30, 12)).all() and (got[:, 16:] == (140, 70, 28)).all()
    assert got.dtype == np.uint8 and got.shape == image.shape


@pytest.mark.numeric
def test_dark_by_hand():
    assert robustness.STRENGTHS["dark"] == (0.4, 0.6, 0.8)
    got = robustness.corrupt(np.full((1, 32, 32, 3), (200, 100, 40), np.uint8), "dark", 2)
    assert (got == (80, 40, 16)).all()


@pytest.mark.parametrize(("name", "strength"), [("fog", 1), ("noise", 4), ("noise", -1)])
def test_an_unknown_corruption_is_refused(image, name, strength):
    with pytest.raises(ValueError, match="expected one of noise, blur"):
        robustness.corrupt(image[None], name, strength)


class Brightness(torch.nn.Module):
    """Says class 1 if an image is brighter than the mean colour, else class 0."""

    def forward(self, images):
        mean = images.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


@pytest.mark.numeric
def test_the_table_holds_the_accuracy_on_corrupted_images():
    bright = np.full((8, 32, 32, 3), 180, np.uint8)
    table = robustness.corrupted_accuracy(Brightness(), "cpu", Images(bright, np.ones(8, np.int64)))
    assert table.shape == (4, 5) and (table.loc[0] == 1).all()
    assert table["dark"].tolist() == [1, 0, 0, 0]  # 0.6 * 180 = 108 is below the mean of 120
    assert table["blur"].tolist() == table["contrast"].tolist() == [1, 1, 1, 1]


def test_the_curves_of_robustness_hold_the_table_below_the_images_from_clean_to_worst(image):
    table = pd.DataFrame(
        {name: [0.9, 0.8, 0.7, 0.1 * i] for i, name in enumerate(robustness.CORRUPTIONS)}
    )
    said = pd.DataFrame("cat", range(4), list(table))
    *panels, axis = robustness.plot_robustness(table, image, said).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [
        table[name].tolist() for name in table
    ]
    shown = np.stack([panel.images[0].get_array() for panel in panels]).reshape(
        4, len(table.columns), 32, 32, 3
    )
    assert (shown[0] == image).all() and [panel.get_ylabel() for panel in panels[::5]][0] == "clean"
    for column, name in enumerate(table):
        assert np.array_equal(shown[3, column], robustness.corrupt(image[None], name, 3)[0])


@pytest.mark.parametrize(
    ("worst", "title"),
    [
        ((0.2, 0.8), "20.0 % (noise) to 80.0 % (darkness)"),
        ((0.8, 0.2), "20.0 % (darkness) to 80.0 % (noise)"),
    ],
)
def test_the_title_names_the_corruptions_that_cost_most_and_least(worst, title):
    table = pd.DataFrame({"noise": [0.9, worst[0]], "dark": [0.9, worst[1]]})
    told = robustness.robustness_title(table)
    assert (
        told == f"At full strength, accuracy is {title}, without corruption 90.0 %; guessing: 10 %"
    )


def test_the_title_says_if_no_corruption_costs_anything():
    table = pd.DataFrame({"noise": [0.9, 0.95], "dark": [0.9, 0.9]})
    assert robustness.robustness_title(table) == "No corruption lowers the accuracy of 90.0 %"


@pytest.mark.numeric
def test_the_prediction_stands_under_each_thumbnail_and_is_coloured_where_it_changed():
    bright = np.full((32, 32, 3), 180, np.uint8)
    said = robustness.corrupted_predictions(Brightness(), "cpu", bright, ["dim", "bright"])
    assert said["dark"].tolist() == ["bright", "dim", "dim", "dim"]
    assert (said["contrast"] == "bright").all()
    table = pd.DataFrame({name: [0.9, 0.8, 0.7, 0.6] for name in said})
    *panels, axis = robustness.plot_robustness(table, bright, said, "a note").axes
    place = 5 + list(said).index("dark")
    assert [panels[i].get_xlabel() for i in (place - 5, place)] == ["bright", "dim"]
    assert panels[place].xaxis.label.get_color() != panels[place - 5].xaxis.label.get_color()
    assert sorted(t.get_text() for t in axis.texts) == sorted(f"{name} 60.0 %" for name in said)
