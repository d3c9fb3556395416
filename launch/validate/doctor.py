"""Part doctor: what `braid doctor` says of the machine."""

import json
import subprocess
import sys

from launch.bench.output import Table, write_whole
from launch.validate.tasks import Setup
from launch.validate.verdict import Check, PartReport

_FILE = "doctor.json"


def examine(setup: Setup) -> None:
    """Ask it, in a process of its own: it opens the cards."""
    command = [sys.executable, "-m", "launch.cli", "doctor", "--json", "--output_dir", str(setup.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.strip():
        write_whole(setup.root / _FILE, done.stdout)


def judge(setup: Setup) -> PartReport:
    """One check: nothing is wrong."""
    report = PartReport(part="doctor", title="The machine")
    path = setup.root / _FILE
    if not path.is_file():
        report.checks.append(Check(part="doctor", layout="", name="braid doctor", state="not run"))
        return report
    findings = json.loads(path.read_text(encoding="utf-8"))["findings"]
    wrong = ", ".join(one["name"] for one in findings if one["state"] == "wrong")
    report.checks.append(
        Check(
            part="doctor",
            layout="",
            name="braid doctor",
            state="failed" if wrong else "passed",
            note=f"wrong: {wrong}" if wrong else "",
        )
    )
    report.record["findings"] = findings
    rows = [[one["name"], one["state"], one["found"], one["cost"], one["remedy"]] for one in findings]
    columns = ("", "", "found", "what it costs", "what mends it")
    report.tables.append(Table(title="braid doctor", columns=columns, rows=rows))
    return report
