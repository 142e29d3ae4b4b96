"""Boards over ssh, without a connection: what comes back, addresses, words for the shell there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hw_profiles.remote import over_ssh, runner, ssh
from hw_profiles.remote.parcel import Parcel
from nas.errors import NasctlError, UsageError

TIMING = {"median_ms": 1.0, "spread_ms": 0.1, "p90_ms": 1.1, "p95_ms": 1.2, "p99_ms": 1.3, "n": 20}
JOB = over_ssh._Job(ssh.Target("board"), Parcel({"a": b""}, b""), Path("state"))


def group_record(timing):
    return {
        "kind": "group",
        "names": ["a"],
        "timings": [{**timing, "noisy": ""}],
        "rounds_ms": [[1.0]],
        "reference_ms": [1.0, 1.1],
    }


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, math.inf, "1", None, True])
@pytest.mark.parametrize("field", ["median_ms", "p99_ms", "n"])
def test_impossible_timings_are_refused(field, bad):
    line = runner.to_line(group_record({**TIMING, field: bad}))
    with pytest.raises(NasctlError, match="ssh://board: it reports .* for 'a'"):
        JOB.result(runner.from_lines(line))


def test_results_that_our_runner_did_not_write_are_refused():
    session = {"kind": "session", "fingerprint": {}}
    short = {**group_record(TIMING), "timings": []}
    nameless = {key: value for key, value in group_record(TIMING).items() if key != "names"}
    for records in ([session, short], [session, nameless], [group_record(TIMING)]):
        with pytest.raises(NasctlError, match="ssh://board: its results are not what our runner"):
            JOB.result(records)


def test_of_two_results_the_later_counts():
    session = {"kind": "session", "fingerprint": {"board": "?"}}
    later = group_record({**TIMING, "median_ms": 1.05})
    result = JOB.result([session, group_record(TIMING), session, later, {"kind": "done"}])
    assert result.timings["a"].median_ms == 1.05
    assert result.fingerprint == {"board": "?"}
    assert result.noise == pytest.approx(1.4826 * 0.05 / 1.05)


# ---- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "host", "user", "port"),
    [
        ("ssh://pi@raspi.local:2222", "raspi.local", "pi", 2222),
        ("ssh://jetson", "jetson", "", None),
        ("ssh://nvidia@10.0.0.7/", "10.0.0.7", "nvidia", None),
        ("ssh://me@[fe80::1]:22", "fe80::1", "me", 22),
    ],
)
def test_addresses(text, host, user, port):
    target = ssh.parse(text)
    assert (target.host, target.user, target.port) == (host, user, port)
    assert str(target) == text.rstrip("/")
    assert ssh.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "pi@raspi",
        "ssh://-oProxyCommand=touch x",
        "ssh://-l@host",
        "ssh://host;reboot",
        "ssh://a@b@c",
        "ssh://host:0",
        "ssh://host:65536",
        "ssh://host:22/tmp",
        "ssh://user:password@host",
        "ssh://ho st",
        "ssh://host\n",
    ],
)
def test_addresses_that_are_refused(text):
    with pytest.raises(UsageError, match=r"--on: .* allowed: local, ssh://\[user@\]host\[:port\]"):
        ssh.parse(text)


def test_words_are_quoted_for_the_shell_there_and_host_keys_are_checked():
    words = ssh.command(ssh.parse("ssh://me@host:7"), ["echo", "a b", "$(reboot)"])
    assert words[words.index("--") + 1 :] == ["host", "echo 'a b' '$(reboot)'"]
    assert "StrictHostKeyChecking=yes" in words
    assert "BatchMode=yes" in words
