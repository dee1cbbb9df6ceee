"""How the Space holds up: `python -m benchmarks.space`, about ten minutes on two cores.

Starts the committed Space and measures: the time to its first answer; one Grad-CAM heatmap for 1,
5 and 20 visitors at once; a change of opacity; 500 mixed requests of 50 visitors within a minute,
each answer compared with the one given alone; and its memory after 200 and after 2,000 requests.
It also takes turns with the app of an earlier commit, which computed one request after the other:
the start, and one heatmap for 1 and for 20 visitors. Writes benchmarks/results/space.json.
`--quick` is a trial of two minutes, printed only.
"""

import contextlib
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks.accuracy import RESULTS
from tools.project import SPACE
from training.console import command_line
from training.files import write_json
from training.hardware import hardware, versions

EARLIER = "8bd0fd3"  # the commit whose app is compared
ANY = "any class"
STAGES = [stage["name"] for stage in json.loads((SPACE / "model.json").read_text())["stages"]]


class Visitor:
    """One client of the Space, by plain HTTP, as anyone could write it."""

    def __init__(self, address: str):
        self.http = httpx.Client(base_url=f"{address}/gradio_api", timeout=300)

    def upload(self, path: Path) -> dict:
        """Upload a picture; return what an endpoint takes for it."""
        with path.open("rb") as file:
            sent = self.http.post("/upload", files={"files": file}).json()[0]
        return {"path": sent, "meta": {"_type": "gradio.FileData"}}

    def ask(self, endpoint: str, *data: object) -> tuple[str, object]:
        """Call an endpoint; return 'complete' or 'error', and what came back."""
        event = self.http.post(f"/call/{endpoint}", json={"data": data}).json()["event_id"]
        with self.http.stream("GET", f"/call/{endpoint}/{event}") as answer:
            lines = [line for line in answer.iter_lines() if line.startswith(("event: ", "data: "))]
        *_, kind, content = [
            line for line in lines if line != "event: heartbeat" and line != "data: null"
        ] or ["", ""]
        return kind.removeprefix("event: "), json.loads(content.removeprefix("data: ") or "null")

    def with_pixels(self, answer: object) -> object:
        """Return an answer with the pixels of each picture, int (H, W, 3), in place of its path."""
        if isinstance(answer, dict) and answer.get("path"):
            content = self.http.get(f"/file={answer['path']}").content
            return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
        if isinstance(answer, dict):
            return {key: self.with_pixels(value) for key, value in answer.items()}
        return list(map(self.with_pixels, answer)) if isinstance(answer, list | tuple) else answer


def is_close(one: object, other: object) -> bool:
    """Tell whether two answers are equal, numbers to 1e-5, pixels to one of 256 levels."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.shape == other.shape and bool(np.abs(one - other).max() <= 1)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-5
    return one == other


@contextlib.contextmanager
def serve(space: Path, uploads: str):
    """Serve `python app.py` on a free port of 127.0.0.1.

    Yields its address, its process and when it was started.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {"GRADIO_SERVER_PORT": port, "GRADIO_TEMP_DIR": uploads}
    start = time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"http://127.0.0.1:{port}/config").raise_for_status()
                break
            if app.poll() is not None:
                raise RuntimeError(f"the app ended with status {app.returncode}")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}", app, start
    finally:
        app.terminate()
        app.wait(30)


def memory(app: subprocess.Popen, key: str) -> float:
    """Return a process's memory in MB, now ('VmRSS') or the most it ever had ('VmHWM')."""
    status = Path(f"/proc/{app.pid}/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) / 1024


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}


def mixed_requests(visitor: Visitor) -> list[tuple]:
    """Make forty different requests: every endpoint, stage and method, some that are refused."""
    pictures = [visitor.upload(path) for path in sorted((SPACE / "examples").glob("*.png"))]
    methods = ("GradCAM", "GradCAM++", "LayerCAM")
    return [
        *(("classify", picture, count) for count, picture in enumerate(pictures, 1)),
        *(
            ("explain", p, True, 1 + i % 4, STAGES[i % 4], methods[i % 3], 0.4)
            for i, p in enumerate(pictures)
        ),
        *(
            ("misclassified", True, 1 + i, ANY, ANY, i % 2 == 0, STAGES[i % 4], methods[i % 3], 0.5)
            for i in range(10)
        ),
        *(("classify", picture, 50) for picture in pictures[:5]),
        *(("explain", picture, True, 2, "layer99", "GradCAM", 0.4) for picture in pictures[:5]),
    ]


def explain_seconds(address: str, count: int, requests: int) -> list[float]:
    """Measure one Grad-CAM heatmap for so many visitors at once, each with a picture of their own.

    Returns:
        Seconds of each request.
    """
    visitors = [Visitor(address) for _ in range(count)]
    files = sorted((SPACE / "examples").glob("*.png"))
    pictures = [visitor.upload(files[i % len(files)]) for i, visitor in enumerate(visitors)]

    def one(index: int) -> list[float]:
        seconds = []
        for _ in range(max(2, requests // count)):
            start = time.perf_counter()
            options = (True, 1, STAGES[-1], "GradCAM", 0.4)
            kind, _ = visitors[index].ask("explain", pictures[index], *options)
            assert kind == "complete"
            seconds.append(time.perf_counter() - start)
        return seconds

    with ThreadPoolExecutor(count) as pool:
        return list(itertools.chain(*pool.map(one, range(count))))


def measure_explain(address: str, requests: int) -> dict[str, dict]:
    """Return percentiles of explain_seconds in milliseconds, by the number of visitors."""
    found = {}
    for count in (1, 5, 20):
        found[str(count)] = percentiles(explain_seconds(address, count, requests))
        print(f"explain, {count} visitors: {found[str(count)]}", flush=True)
    return found


def earlier_space(folder: Path) -> Path:
    """Write the Space of an earlier commit into a folder."""
    command = ["git", "archive", EARLIER, "space"]
    done = subprocess.run(command, cwd=SPACE.parent, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder / "space"


def cold_start(space: Path, uploads: str) -> float:
    """Return the seconds from the start of an app to its first answer."""
    with serve(space, uploads) as (address, _, start):
        visitor = Visitor(address)
        picture = visitor.upload(SPACE / "examples/cat.png")
        assert visitor.ask("classify", picture, 3)[0] == "complete"
        return time.perf_counter() - start


def measure_ratios(uploads: str, rounds: int, requests: int) -> dict[str, float]:
    """Compare the app with that of the earlier commit, taking turns on this machine.

    Returns:
        Ratios, below 1 where this app is faster: of the median time to the first answer, and of
        the medians of all requests with 1 and with 20 visitors.
    """
    with tempfile.TemporaryDirectory() as folder:
        spaces = [SPACE, earlier_space(Path(folder))]
        turns = list(itertools.product(range(rounds), (0, 1)))
        starts: tuple[list[float], list[float]] = ([], [])
        for _, which in turns:
            starts[which].append(cold_start(spaces[which], uploads))
        medians = [statistics.median(seconds) for seconds in starts]
        found = {"cold_start_ratio": round(medians[0] / medians[1], 3)}
        with serve(spaces[0], uploads) as (ours, *_), serve(spaces[1], uploads) as (theirs, *_):
            for count in (1, 20):
                seconds: tuple[list[float], list[float]] = ([], [])
                for address in (ours, theirs):  # to warm up
                    explain_seconds(address, count, 2 * count)
                for _, which in turns:
                    seconds[which].extend(
                        explain_seconds((ours, theirs)[which], count, max(requests, 2 * count))
                    )
                medians = [statistics.median(one) for one in seconds]
                print(f"{count} visitors, this app and {EARLIER}: {medians}", flush=True)
                found[f"p50_{count}_ratio"] = round(medians[0] / medians[1], 3)
    return found


def measure_opacity(address: str, moves: int) -> float:
    """Measure a move of the opacity slider by the page's protocol: median milliseconds."""
    http, session = httpx.Client(base_url=f"{address}/gradio_api", timeout=60), "benchmark"
    config = httpx.get(f"{address}/config").json()
    explain = next(event for event in config["dependencies"] if event.get("api_name") == "explain")
    opacity = explain["inputs"][-1]
    recolor = next(
        event
        for event in config["dependencies"]
        if [opacity, "input"] in map(list, event["targets"])
    )

    def run(event: dict, data: list) -> float:
        start = time.perf_counter()
        http.post(
            "/queue/join", json={"data": data, "fn_index": event["id"], "session_hash": session}
        )
        with http.stream("GET", "/queue/data", params={"session_hash": session}) as stream:
            for line in stream.iter_lines():
                message = (
                    json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                )
                if message.get("msg") == "process_completed":
                    assert message["success"], message
                    return time.perf_counter() - start
        raise AssertionError("the stream ended")

    picture = Visitor(address).upload(SPACE / "examples/cat.png")
    run(explain, [picture, True, 2, STAGES[-1], "GradCAM", 0.4])
    seconds = [
        run(recolor, [None, picture, 3, True, 2, STAGES[-1], "GradCAM", i / moves])
        for i in range(moves)
    ]
    return round(1000 * statistics.median(seconds), 1)


def measure_load(address: str, visitors: int, requests: int, seconds: float) -> dict[str, float]:
    """Send mixed requests of many visitors, spread over some seconds.

    Each answer is compared with the one given alone, which was not computed in a batch.

    Returns:
        How many requests there were, how many answers were wrong, how many failed, the seconds.
    """
    first = Visitor(address)
    wanted = mixed_requests(first)
    alone = [
        (kind, first.with_pixels(answer))
        for kind, answer in (first.ask(*request) for request in wanted)
    ]

    def one(number: int) -> tuple[int, int]:
        visitor, wrong, failed = Visitor(address), 0, 0
        each = requests // visitors
        for turn in range(each):
            due = start + seconds * (turn + number / visitors) / each
            time.sleep(max(0.0, due - time.perf_counter()))
            index = (7 * number + turn) % len(wanted)
            try:
                kind, answer = visitor.ask(*wanted[index])
                expected_kind, expected = alone[index]
                right = kind == expected_kind and is_close(visitor.with_pixels(answer), expected)
                wrong += not right
            except Exception as problem:  # whatever went wrong, the visitor had no answer
                print(f"failed: {problem!r:.200}", flush=True)
                failed += 1
        return wrong, failed

    start = time.perf_counter()
    with ThreadPoolExecutor(visitors) as pool:
        wrong, failed = (
            sum(column) for column in zip(*pool.map(one, range(visitors)), strict=True)
        )
    return {
        "requests": requests,
        "wrong": wrong,
        "failed": failed,
        "load_s": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Measure all of it and write benchmarks/results/space.json."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as uploads:
        found: dict[str, object] = {"cold_start_s": round(cold_start(SPACE, uploads), 2)}
        found |= measure_ratios(uploads, 1 if quick else 5, 20 if quick else 60)
        print(found, flush=True)
    with tempfile.TemporaryDirectory() as uploads, serve(SPACE, uploads) as (address, app, _):
        found["explain_ms"] = measure_explain(address, 20 if quick else 100)
        found["opacity_ms"] = measure_opacity(address, 10 if quick else 100)
        found |= measure_load(address, 50, 100 if quick else 500, 12 if quick else 60)
        # Memory: the measurements before have warmed everything up.
        few, many = (40, 80) if quick else (200, 1800)
        measure_load(address, 20, few, 0)
        before = memory(app, "VmRSS")
        more = measure_load(address, 20, many, 0)
        found |= {f"memory_{key}": more[key] for key in ("wrong", "failed")}
        found |= {
            "memory_growth": round(memory(app, "VmRSS") / before - 1, 3),
            "rss_mb": round(memory(app, "VmRSS")),
        }
        found["peak_rss_mb"] = round(memory(app, "VmHWM"))
    found |= {"machine": hardware(), "versions": versions()}
    print(json.dumps(found, indent=1))
    if not quick:
        write_json(RESULTS / "space.json", found)


if __name__ == "__main__":
    main()
