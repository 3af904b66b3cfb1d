"""Reports: what they say, and which of them is the last one."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelgraph.report import (
    Decision,
    Reason,
    Report,
    _merged,
    last_report,
    publish,
    publish_graph,
)

KERNEL = "owner/norm@0123abcd: RMSNorm"


def decision(path: str, kernel: str = KERNEL, **fields: str) -> Decision:
    reason = Reason.KERNEL if kernel else Reason.NO_MODE
    return Decision(path, "RMSNorm", "cuda", "INFERENCE", reason, kernel)._replace(**fields)


def text(*decisions: Decision, source: str = "kernelize") -> str:
    return str(Report(source, decisions))


class TestText:
    def test_an_empty_report_is_one_line(self) -> None:
        assert text() == "kernelize: 0 of 0 extensible layers use a kernel"

    def test_decisions_are_a_table(self) -> None:
        shown = text(
            decision("norm"),
            decision("mlp.act", "", layer="SiluAndMul", detail="registered modes: TRAINING"),
            decision(""),
        )
        assert shown.splitlines() == [
            "kernelize for cuda, INFERENCE: 2 of 3 extensible layers use a kernel",
            "path     layer       kernel or reason",
            "norm     RMSNorm     owner/norm@0123abcd: RMSNorm",
            "(model)  RMSNorm     owner/norm@0123abcd: RMSNorm",
            "mlp.act  SiluAndMul  reference: no kernel is registered for the mode "
            "(registered modes: TRAINING)",
        ]

    def test_layers_that_are_alike_share_a_row(self) -> None:
        decisions = [decision(f"blocks.{i}.norm", "" if i == 2 else KERNEL) for i in range(12)]
        assert text(*decisions, decision("norm")).splitlines()[2:] == [
            "blocks.0-1,3-11.norm  RMSNorm  owner/norm@0123abcd: RMSNorm",
            "norm                  RMSNorm  owner/norm@0123abcd: RMSNorm",
            "blocks.2.norm         RMSNorm  reference: no kernel is registered for the mode",
        ]

    def test_ops_and_differing_modes_are_shown(self) -> None:
        shown = text(
            decision("a", op="kernelgraph::norm_1"),
            decision("b", op="kernelgraph::norm_2", mode="TRAINING | TORCH_COMPILE"),
            source="torch.compile",
        )
        assert shown.splitlines() == [
            "torch.compile: 2 of 2 extensible layers use a kernel",
            "path  layer    device  mode                      kernel or reason              op",
            "a     RMSNorm  cuda    INFERENCE                 owner/norm@0123abcd: RMSNorm  "
            "kernelgraph::norm_1",
            "b     RMSNorm  cuda    TRAINING | TORCH_COMPILE  owner/norm@0123abcd: RMSNorm  "
            "kernelgraph::norm_2",
        ]

    def test_an_unknown_device_is_left_out(self) -> None:
        shown = text(decision("a", "", device="", mode=""), source="torch.compile")
        assert shown.startswith("torch.compile: 0 of 1 extensible layers use a kernel\n")


class TestMergedPaths:
    @pytest.mark.parametrize(
        ("paths", "merged"),
        [
            ([""], [""]),
            (["", "0", "1"], ["", "0-1"]),
            (["a", "b"], ["a", "b"]),
            (["a.0", "a.1", "b.1"], ["a.0-1", "b.1"]),
            (["0.a", "2.a", "1.a", "7.a"], ["0-2,7.a"]),
            (["0.a.0", "0.a.1", "1.a.0", "1.a.1"], ["0-1.a.0-1"]),
            (["0.a.0", "0.a.1", "1.a.0"], ["0.a.0-1", "1.a.0"]),
            (["0", "0.1", "0.2.x"], ["0", "0.1", "0.2.x"]),
            (["9", "10"], ["9-10"]),
        ],
    )
    def test_paths_that_differ_in_an_index_are_merged(
        self, paths: list[str], merged: list[str]
    ) -> None:
        assert _merged(paths) == merged

    @given(st.lists(st.lists(st.sampled_from(["0", "1", "2", "3", "a", ""]), max_size=3)))
    def test_merged_paths_stand_for_the_same_paths(self, parts: list[list[str]]) -> None:
        def expand(path: str) -> set[str]:
            expanded = {""}
            for part in path.split("."):
                options = [part]
                if part and all(c in "0123-," for c in part):
                    options = []
                    for ends in part.split(","):
                        first, *last = map(int, ends.split("-"))
                        options += map(str, range(first, (last or [first])[0] + 1))
                expanded = {f"{head}.{option}" for head in expanded for option in options}
            return {path[1:] for path in expanded}

        paths = [".".join(part) for part in parts]
        merged = _merged(paths)
        expanded = [path for row in merged for path in expand(row)]
        assert sorted(expanded) == sorted(set(paths))


class TestPublish:
    def test_the_published_report_is_the_last_one(self) -> None:
        report = Report("kernelize", (decision("a"),))
        publish(report)
        assert last_report() is report

    def test_each_decision_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger="kernelgraph")
        publish(Report("torch.compile", (decision("a"), decision("", "", detail="none"))))
        assert [(r.name, r.levelname) for r in caplog.records] == [("kernelgraph", "INFO")] * 2
        assert caplog.messages == [
            "torch.compile: layer RMSNorm at a for cuda, INFERENCE: owner/norm@0123abcd: RMSNorm",
            "torch.compile: layer RMSNorm at (model) for cuda, INFERENCE: reference: no kernel is "
            "registered for the mode (none)",
        ]

    def test_nothing_is_logged_above_info(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.WARNING, logger="kernelgraph")
        publish(Report("kernelize", (decision("a"),)))
        assert not caplog.records


class TestGraphs:
    def test_graphs_of_one_model_make_one_report(self) -> None:
        model = Report("stands for a call of torch.compile")
        publish_graph([decision("a"), decision("b", "")], model)
        publish_graph([decision("b"), decision("c")], model)
        report = last_report()
        assert report is not None
        assert report.decisions == (decision("a"), decision("b"), decision("c"))

    @pytest.mark.parametrize("unknown", [False, True])
    def test_graphs_of_another_model_make_another_report(self, unknown: bool) -> None:
        one, other = Report("one"), Report("another")
        publish_graph([decision("a")], None if unknown else one)
        publish_graph([decision("b")], None if unknown else other)
        assert last_report() == Report("torch.compile", (decision("b"),))

    def test_a_report_that_does_not_change_is_not_published_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "kernelgraph")
        model = Report("stands for a call of torch.compile")
        for _ in range(2):
            publish_graph([decision("a")], model)
        assert len(caplog.messages) == 1
        publish(Report("kernelize"))
        publish_graph([decision("a")], model)
        assert last_report() == Report("torch.compile", (decision("a"),))


def test_decisions_say_whether_a_kernel_is_used() -> None:
    used, kept = decision("a"), decision("b", "")
    assert used.uses_kernel
    assert not kept.uses_kernel
    assert Report("kernelize", (kept, used)).kernels == (used,)
