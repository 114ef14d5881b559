"""The paper's tables as data, against a second transcription of their shape, and how they are printed."""

import pytest

from engine.evaluation import paper_tables

JITTERED = (256, 512)


def test_each_table_has_the_papers_rows():
    trained = {number: [row.networks for row in rows] for number, rows in paper_tables.TABLES.items()}
    assert [networks[0] for networks in trained[3]] == [
        *((arch, (256, 256)) for arch in ("A", "A-LRN", "B")),
        *((arch, scale) for arch in "CDE" for scale in ((256, 256), (384, 384), JITTERED)),
    ]
    assert trained[4] == trained[3][2:]
    assert trained[5] == [(("D", JITTERED),)] * 3 + [(("E", JITTERED),)] * 3
    assert trained[6] == [(("D", JITTERED), ("E", JITTERED))] * 3
    # Sums of a column: a slip in one figure would show.
    sums = {
        number: [round(sum(e), 1) for e in zip(*(row.paper for row in rows), strict=True)]
        for number, rows in paper_tables.TABLES.items()
    }
    assert sums == {3: [330.6, 109.6], 4: [266.3, 85.7], 5: [147.6, 44.2], 6: [71.6, 21.1]}


@pytest.mark.parametrize(
    ("crop", "scale", "trained", "one", "several"),
    [
        (224, (256, 256), (256, 256), (256,), (224, 256, 288)),
        (224, (384, 384), (384, 384), (384,), (352, 384, 416)),
        (224, JITTERED, JITTERED, (384,), (256, 384, 512)),
        (32, (256, 256), (36, 36), (36,), (32, 36, 40)),
        (32, (384, 384), (54, 54), (54,), (50, 54, 58)),
        (32, JITTERED, (36, 73), (54,), (36, 54, 73)),
    ],
)
def test_scales(crop, scale, trained, one, several):
    assert paper_tables.train_scale(scale, crop) == trained
    assert paper_tables.scales_to_test(trained, crop, several=False) == one
    assert paper_tables.scales_to_test(trained, crop, several=True) == several


def test_rows_are_those_whose_networks_are_all_given():
    assert paper_tables.rows_with(6, [("D", JITTERED)], 224) == []
    assert len(paper_tables.rows_with(6, [("D", JITTERED), ("E", JITTERED)], 224)) == 3
    assert paper_tables.rows_with(3, [("D", JITTERED)], 32) == [], "a scale of another crop"
    assert [row.networks[0][0] for row in paper_tables.rows_with(4, [("A", (36, 36)), ("B", (36, 36))], 32)] == ["B"]


def test_ours_are_printed_beside_the_papers():
    (row,) = paper_tables.rows_with(3, [("D", JITTERED)], 224)
    lines = paper_tables.formatted(3, {row: (25.94, 8.25)}, 224).splitlines()
    assert len(lines) == 3 + 12
    assert "D [256;512] 384 25.9 25.6 8.2 8.1" in [" ".join(line.split()) for line in lines]
    assert "E [256;512] 384 – 25.5 – 8.0" in [" ".join(line.split()) for line in lines]
    both = paper_tables.TABLES[6][2]
    lines = paper_tables.formatted(6, {both: (23.5, 6.5)}, 32).splitlines()
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "D [36;73] 36,54,73",
        "E [36;73] 36,54,73",
        "dense – 24.0 – 7.1",
        "multi-crop – 23.9 – 7.2",
        "multi-crop & dense 23.5 23.7 6.5 6.8",
    ]
