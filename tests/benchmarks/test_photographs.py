import os

from benchmarks import photographs


def test_of_two_processes_that_make_the_folder_the_slower_takes_the_others(tmp_path, monkeypatch):
    folder, rename = tmp_path / "photographs", os.rename

    def beaten(unfinished, target):
        (folder / "of the other").mkdir(parents=True)
        rename(unfinished, target)

    monkeypatch.setattr(photographs.os, "rename", beaten)
    assert photographs.photograph_folder(folder, train=2, val=2) == folder
    assert os.listdir(folder) == ["of the other"]
    assert os.listdir(tmp_path) == ["photographs"], "nothing half-made is left"
