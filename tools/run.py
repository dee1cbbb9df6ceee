"""`make run`: execute the notebook into runs/, serve its Space; `make app`: the committed one.

`python -m tools.run execute more.ipynb` executes a notebook in its place.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from tools.project import NOTEBOOK, PROJECT, SPACE, read_results
from training.console import forgive_output

HOST, PORT = "127.0.0.1", os.environ.get("GRADIO_SERVER_PORT") or "7860"
# Text that a terminal overwrites: a line up to a carriage return, and what follows one at the end.
TRANSIENT = re.compile(r"(?:\r[^\r\n]*)+\Z|[^\r\n]*\r(?!\n)")


class TalkingClient(NotebookClient):
    """Executes a notebook and prints the output of its cells at once.

    Attributes:
        exit_code: of a kernel that died, -N if signal N killed it.
        tidying: whether nbclient itself ends the kernel, at the end or after Ctrl-C.
    """

    exit_code = None
    tidying = False

    def process_message(self, message: dict, cell: nbformat.NotebookNode, index: int) -> object:
        """Print a message of the kernel if it is text that a cell prints."""
        if message["msg_type"] == "stream":
            text = message["content"]["text"]
            print(text if sys.stdout.isatty() else TRANSIENT.sub("", text), end="", flush=True)
        return super().process_message(message, cell, index)

    async def _async_check_alive(self) -> None:
        try:
            await super()._async_check_alive()
        except DeadKernelError:
            if self.km and self.km.provisioner and not self.tidying:
                self.exit_code = await self.km.provisioner.poll()
            raise

    async def _async_cleanup_kernel(self) -> None:
        self.tidying = True
        await super()._async_cleanup_kernel()


class KernelDied(RuntimeError):
    """The kernel ended in the middle of a cell; the message names the cause."""


def cause_of_death(exit_code: int) -> str:
    """Describe what ended a kernel."""
    if exit_code in (-9, 137):  # SIGKILL, in the notation of Python and of a shell
        return (
            "it was killed (SIGKILL), most likely because the memory ran out. Close what else uses"
            " it, or set ERA_BATCH_SIZE or ERA_ARCH to something smaller"
        )
    if exit_code < 0:
        return f"it was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return f"its exit code is {exit_code}"


def execute(out: Path, name: str = NOTEBOOK) -> None:
    """Run all cells in the project folder and write the executed notebook, after an error as well.

    Args:
        out: the folder for the executed notebook.
        name: of the notebook.

    Raises:
        CellExecutionError: if a cell fails.
        KernelDied: if the kernel ends in the middle of a cell.
    """
    notebook = nbformat.read(PROJECT / name, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:  # what is not reached must not look as if it had been executed
        cell.update(outputs=[], execution_count=None)
    client = TalkingClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(PROJECT)}},
        on_cell_start=lambda cell, cell_index: announce(notebook, cells, cell, cell_index),
    )
    # ipykernel shows figures as pictures unless this variable names another backend.
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    try:
        client.execute(env=environment)
    except DeadKernelError as error:
        if client.exit_code is None:
            raise
        raise KernelDied(cause_of_death(client.exit_code)) from error
    finally:
        # GitHub may not show a notebook that holds the state of widgets.
        notebook.metadata.pop("widgets", None)
        nbformat.write(notebook, out / name)


def announce(
    notebook: nbformat.NotebookNode, cells: list, cell: nbformat.NotebookNode, index: int
) -> None:
    """Print the heading right above a code cell, if there is one.

    Args:
        notebook: that is executed.
        cells: its code cells.
        cell: the cell that begins.
        index: of the cell among all cells.
    """
    before = notebook.cells[index - 1] if index else cell
    if cell.cell_type == "code" and before.source.startswith("## "):
        heading = before.source.splitlines()[0].removeprefix("## ")
        print(f"\n[cell {cells.index(cell) + 1} of {len(cells)}] {heading}", flush=True)


def port_is_free() -> bool:
    """Tell whether a server can listen on HOST and PORT; say so if it cannot."""
    with socket.socket() as probe:
        if os.name != "nt":  # on Windows, this option allows to bind a port that is in use
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(PORT)))
        except OSError:
            print(f"Port {PORT} is in use: stop what uses it, or set GRADIO_SERVER_PORT.")
            return False
    return True


def serve(space: Path) -> int:
    """Serve a Space until Ctrl-C or SIGTERM, say when it answers, and return its exit status."""
    if not port_is_free():  # it may have been taken since a training began
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the app would stay
    here = {"GRADIO_SERVER_NAME": HOST, "GRADIO_SERVER_PORT": PORT, "GRADIO_NUM_PORTS": "1"}
    environment = os.environ | here
    app = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.DEVNULL
    )
    try:
        while app.poll() is None:
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((HOST, int(PORT))) == 0:
                    address = f"http://{HOST}:{PORT}"
                    print(
                        f"\nThe app of {space} answers on {address} (stop it with Ctrl-C)",
                        flush=True,
                    )
                    break
            time.sleep(0.3)
        return app.wait()
    except KeyboardInterrupt:
        app.terminate()
        app.wait(10)
        return 0


def run() -> int:
    """Execute the notebook, then serve the run's Space, or the committed one after a sample run.

    Returns:
        The exit status.
    """
    forgive_output()  # cells may print what the terminal cannot show
    if not port_is_free():
        return 1
    out = PROJECT / "runs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    out.mkdir(parents=True)
    os.environ["ERA_OUT_DIR"] = str(out.relative_to(PROJECT))  # relative: the notebook prints it
    print(f"Executing {NOTEBOOK}; everything it writes goes to {out}", flush=True)
    up_to_there = f"The notebook up to there is {out / NOTEBOOK}"
    try:
        execute(out)
    except CellExecutionError as error:
        print(f"\nA cell failed:\n{error}\n{up_to_there}")
        return 1
    except KernelDied as error:
        print(f"\nThe notebook's kernel died: {error}.")
        print(f"Run again to continue the training. {up_to_there}")
        return 1
    # nbclient raises any of them after Ctrl-C.
    except (KeyboardInterrupt, DeadKernelError, AssertionError):
        print(f"\nStopped. Run again to continue the training. {up_to_there}")
        return 130
    print(f"\nThe executed notebook is {out / NOTEBOOK}")
    if read_results(out).get("data") == "CIFAR-10":
        return serve(out / "space")
    print("This run was on the built-in sample, so the Space that is served is the committed one.")
    return serve(SPACE)


def main() -> int:
    """Parse the command line and do what it says."""
    forgive_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "app", "execute"])
    parser.add_argument("notebook", nargs="?", default="more.ipynb", help="to execute in its place")
    args = parser.parse_args()
    if not PORT.isdecimal() or not 1 <= int(PORT) <= 65535:
        parser.error(f"GRADIO_SERVER_PORT: expected a number from 1 to 65535, got {PORT!r:.60}")
    if args.command == "execute":
        execute(PROJECT, args.notebook)
        return 0
    return run() if args.command == "run" else serve(SPACE)


if __name__ == "__main__":
    sys.exit(main())
