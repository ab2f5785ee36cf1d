"""The program that counts attacks: its judgement can fail, and what it sends is what it says."""

import json
import random

import pytest
from PIL import UnidentifiedImageError

from benchmarks.serving import attacks
from benchmarks.serving.attack_hooks import cheaper
from benchmarks.tables import attack_counts
from pipeline.images import EditError, open_image

GOOD = {
    "kind": "attacks", "device": "CPU X", "torch": "2.0", "commit": "abc1234", "minutes": 15.0,
    "schemathesis": {"cases": 6100, "failures": []},
    "pictures": {"sent": 1500, "statuses": {"200": 900, "400": 600}, "wrong": []},
    "videos": {"sent": 120, "edited": 80, "refused": 40, "unexplained": []},
    "load": {"unexpected": {}, "live": {"clients": 16, "frames": 9000}, "posting": {"clients": 8, "frames": 4000}},
    "hostile": {"sent": 600, "statuses": {"scans: 400": 300, "keys: ReadTimeout": 200, "keys: 503": 100}},
    "bystander": {"asked": 5000, "worst_s": {"/health": 0.4, "/edit": 1.5}, "over_5_s": 0, "statuses": {"200": 4990, "503": 10}},
    "memory_mb": {"before": 900, "after": 950, "most": 2500},
    "complaints": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "group, change, named",
    [
        ("schemathesis", {"failures": ["Server error"]}, "Server error"),
        ("pictures", {"wrong": ["PNG: 500 oh"]}, "500 oh"),
        ("hostile", {"statuses": {"scans: 500": 1}}, "scans: 500"),
        ("bystander", {"statuses": {"500": 1}}, "500"),
        ("bystander", {"statuses": {"ReadTimeout": 1}}, "ReadTimeout"),
        ("bystander", {"over_5_s": 1, "worst_s": {"/health": 7.0}}, "7.0"),
        ("memory_mb", {"after": 1100}, "memory"),
        ("load", {"unexpected": {"500: oh": 3}}, "500: oh"),
        ("videos", {"unexplained": ["3: ''"]}, "video"),
    ],
)
def test_each_thing_that_must_not_be_is_complained_of(group, change, named):
    assert attacks.complaints(GOOD) == []
    found = attacks.complaints(GOOD | {group: GOOD[group] | change})
    assert len(found) == 1 and named in found[0]


def test_the_table_says_what_was_sent_and_what_came_of_it(tmp_path):
    assert attack_counts(tmp_path) == ""
    (tmp_path / "attacks-x.json").write_text(json.dumps(GOOD))
    text = attack_counts(tmp_path)
    assert "6,100 requests" in text and "waited at most 0.4 s for `/health`, 1.5 s for `/edit`" in text and "80 edited, 40 refused" in text
    assert "complaints" not in text
    (tmp_path / "attacks-x.json").write_text(json.dumps(GOOD | {"complaints": ["one"]}))
    assert "1 complaints" in attack_counts(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of some damage
def test_flipped_pictures_are_damaged_and_not_all_of_them_beyond_reading():
    opened = refused = 0
    for kind, data in attacks.flipped_pictures(len(attacks.FORMATS) * 3):
        assert data != attacks.picture_file(96, 64, "JPEG" if kind == "progressive" else kind, 3)
        try:
            open_image(data)
            opened += 1
        except (EditError, UnidentifiedImageError, OSError, ValueError, SyntaxError):
            refused += 1
    assert opened > 3 and refused > 3, (opened, refused)


def test_damaged_videos_are_edited_or_refused_and_counted():
    report = attacks.by_videos(8)
    assert report["sent"] == report["edited"] + report["refused"] == 8 and report["unexplained"] == []
    assert attacks.flipped(bytes(1000), random.Random(1)) != bytes(1000)


def test_a_good_request_becomes_small_and_a_bad_one_stays_bad():
    assert cheaper({"width": 2048, "steps": 8, "reference_area": "stock"}) == {
        "width": 64, "height": 64, "steps": 2, "reference_area": "output",
    }  # fmt: skip
    bad = {"width": 4096, "height": True, "steps": "8", "reference_area": "x"}
    assert cheaper(bad) == bad
