"""The YOLO text format is read strictly, in pixels, and never outside its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from haechi.components.shared.errors import InputError
from haechi.components.shared.yolo_format import label_path, own_label_path, read_data_yaml, read_labels, split_images

NAMES = ("smoke", "fire")


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def data_yaml(folder: Path, text: str) -> Path:
    write(folder / "images/train/a.jpg")
    return write(folder / "data.yaml", text)


def test_boxes_are_pixels_clipped_to_the_image(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "1 0.5 0.5 0.5 0.25\n0 0.05 0.5 0.2 1\n\n1 0.5 0.5 0.5 0.25\n")
    boxes = read_labels(file, NAMES, 200, 100)
    assert [(b.class_name, round(b.x1, 6), b.y1, b.x2, b.y2) for b in boxes] == [
        ("fire", 50, 37.5, 150, 62.5),
        ("smoke", 0, 0, pytest.approx(30), 100),
    ]


def test_a_polygon_becomes_its_bounding_box(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "0 0.1 0.2 0.5 0.1 0.3 0.9")
    (box,) = read_labels(file, NAMES, 100, 100)
    assert (box.x1, box.y1, box.x2, box.y2) == pytest.approx((10, 10, 50, 90))


def test_a_missing_label_file_is_a_background_image(tmp_path: Path) -> None:
    assert read_labels(tmp_path / "none.txt", NAMES, 10, 10) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("nan 0.5 0.5 0.1 0.1", "class nan"),
        ("0 nan 0.5 0.1 0.1", "NaN"),
        ("0 inf 0.5 0.1 0.1", "NaN or infinite"),
        ("0 1.5 0.5 0.1 0.1", "outside 0 to 1"),
        ("0 320 240 50 50", "outside 0 to 1"),
        ("0 0.5 0.5 0 0.1", "no area"),
        ("0 0.5 0.5 0.1", "3 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.9", "5 numbers"),
        ("fire 0.5 0.5 0.1 0.1", "not numbers"),
    ],
)
def test_a_bad_line_is_told_with_file_and_line(tmp_path: Path, line: str, says: str) -> None:
    file = write(tmp_path / "a.txt", f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(InputError, match=says) as caught:
        read_labels(file, NAMES, 100, 100)
    assert f"{file}:2" in str(caught.value)


def test_a_split_may_be_a_folder_a_list_or_several(tmp_path: Path) -> None:
    write(tmp_path / "images/train/deep/b.PNG")
    write(tmp_path / "images/val/c.jpg")
    write(tmp_path / "images/train/notes.md")
    write(tmp_path / "test.txt", "./images/val/c.jpg\nimages/train/a.jpg\n")
    file = data_yaml(
        tmp_path, "path: .\ntrain: images/train\nval: [images/val, images/train]\ntest: test.txt\nnames: [smoke, fire]"
    )
    data = read_data_yaml(file)
    assert data.names == NAMES
    names = {split: [item.name for item in split_images(data, split)] for split in data.splits}
    assert names == {"train": ["a.jpg", "b.PNG"], "val": ["a.jpg", "b.PNG", "c.jpg"], "test": ["a.jpg", "c.jpg"]}
    assert label_path(split_images(data, "test")[0]) == tmp_path / "labels/train/a.txt"


def test_roboflow_writes_a_path_one_folder_too_high(tmp_path: Path) -> None:
    write(tmp_path / "train/images/a.jpg")
    write(tmp_path / "data.yaml", "train: ../train/images\nnames: ['fire']")
    assert [item.name for item in split_images(read_data_yaml(tmp_path), "train")] == ["a.jpg"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path: ..\ntrain: images\nnames: [a]", "leads outside"),
        ("path: /etc\ntrain: images\nnames: [a]", "leads outside"),
        ("train: ../elsewhere\nnames: [a]", "leads outside"),
        ("train: /etc\nnames: [a]", "leads outside"),
        ("train: images/../../other\nnames: [a]", "leads outside"),
        ("names: [a]", "names no split"),
        ("train: images/train", "no list of class names"),
        ("train: images/train\nnames: [a, a]", "stands twice"),
        ("train: images/train\nnames: {1: a}", "not 0 to 0"),
        ("train: images/train\nnames: {0: }", "no list of class names"),
        ("[1, 2]", "no mapping"),
        ("a: [", "not YAML"),
        ("train: !!python/object/apply:os.system ['true']\nnames: [a]", "not YAML"),
        (f"names: {'[' * 20_000}{']' * 20_000}", "not YAML"),
        ('train: "a\\0b"\nnames: [a]', "train holds a path that cannot be used"),
        (f"train: {'x' * 5000}\nnames: [a]", "train holds a path that cannot be used .*too long"),
        ("path: [images]\ntrain: images\nnames: [a]", "path is no path but a list"),
        ("train: {a: b}\nnames: [a]", "train is no path but a dict"),
    ],
)
def test_a_bad_data_yaml_is_told(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=says):
        read_data_yaml(data_yaml(tmp_path / "set", text))


def test_aliases_that_grow_a_thousandfold_are_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    for use in ("path: *a11\ntrain: images", "train: *a11"):
        with pytest.raises(InputError, match="is no path but a list"):
            read_data_yaml(data_yaml(tmp_path, "\n".join([*lines, use, "names: [a]"])))


def test_a_line_of_a_list_that_no_file_can_be_named_is_told(tmp_path: Path) -> None:
    for line in ("images/\0.jpg", "x" * 5000):
        write(tmp_path / "val.txt", f"images/train/a.jpg\n{line}\n")
        data = read_data_yaml(data_yaml(tmp_path, "val: val.txt\nnames: [a]"))
        with pytest.raises(InputError, match=r"val.txt: line 2 holds a path that cannot be used"):
            split_images(data, "val")


@pytest.mark.parametrize("link", ["labels", "labels/train", "labels/train/a.txt"])
def test_labels_reached_by_a_link_are_refused(tmp_path: Path, link: str) -> None:
    write(tmp_path / "else/train/a.txt", "0 0.5 0.5 0.1 0.1")
    data = read_data_yaml(data_yaml(tmp_path / "set", "train: images/train\nnames: [a]"))
    (tmp_path / "set" / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "set" / link).symlink_to(tmp_path / "else" / Path(link).relative_to("labels"))
    with pytest.raises(InputError, match="leads outside"):
        own_label_path(data, split_images(data, "train")[0])


def test_a_folder_called_images_above_the_set_is_none_of_its_business(tmp_path: Path) -> None:
    file = write(tmp_path / "images/set/data.yaml", "train: .\nnames: [a]")
    write(tmp_path / "images/set/a.jpg")
    write(tmp_path / "labels/set/a.txt", "of a neighbour")
    data = read_data_yaml(file)
    assert own_label_path(data, split_images(data, "train")[0]) == tmp_path / "images/set/a.txt"


def test_images_reached_by_a_link_or_a_list_outside_are_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "secret.jpg")
    file = data_yaml(tmp_path / "set", "train: images/train\nval: val.txt\ntest: missing\nnames: [a]")
    write(tmp_path / "set/val.txt", "../secret.jpg\n")
    (tmp_path / "set/images/train/link.jpg").symlink_to(outside)
    data = read_data_yaml(file)
    for split in ("train", "val"):
        with pytest.raises(InputError, match="leads outside"):
            split_images(data, split)
    with pytest.raises(InputError, match="does not exist"):
        split_images(data, "test")
    with pytest.raises(InputError, match="no split 'dev'"):
        split_images(data, "dev")
