"""The page of a run in a real browser, the terminal view in a real terminal, and workspaces by their JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from wandb_server import WandbServer

from kexue.callbacks.pictures import save_picture
from kexue.cli import main as cli
from kexue.cli.dashboards.report import MAX_POINTS, charts, read_series, thinned
from kexue.cli.dashboards.workspaces import FAMILIES

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)  # fmt: skip  # noqa: E501
ATTACK = "</script><img src=x onerror=\"document.title='run'\"><b>bold</b>"


def make_run(folder: Path) -> Path:
    """A run directory with everything in it, some of it hostile."""
    import torch

    folder.mkdir(parents=True)
    config = {"name": f"tiny {ATTACK}", "model": {"_target_": "a.B", "dim": 3}, "password": "hush", "empty": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = ["step,train/loss,val/loss,lr-AdamW,text"]
    lines += [f"{step},{'nan' if step == 30 else 2.0 / (1 + step)},,0.1,word" for step in range(60)]
    lines += ["59,,0.25,,", "59,,,,"]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "metrics.json").write_text('{"test/loss": 0.125, "train/loss": null, "val/loss": 0.25}')
    (folder / "provenance.json").write_text('{"git": {"commit": "abc"}, "data": null}')
    save_picture(torch.rand(8, 8), folder / "plots" / "val" / "samples" / "step=1.png")
    save_picture(torch.rand(8, 8), folder / "predictions" / "images" / "0000.png")
    rows = [
        {"wrong": 1, "right": 9},
        {"right": False, "input": ATTACK, "gold": "甲", "predicted": "乙"},
        {"right": True, "input": {"image": "images/0000.png"}, "gold": "1", "predicted": "1"},
        {"right": True, "input": {"image": "../../secret.png"}, "gold": "2", "predicted": "2"},
    ]
    (folder / "predictions" / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder.parent / "secret.png").write_bytes(b"not to be read")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("report") / "run")
    assert cli.main(["dashboard", f"run={folder}", "view=html"]) == 0
    return folder / "report.html"


def content(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


def test_the_page_holds_everything_and_loads_nothing(page: Path) -> None:
    text, data = page.read_text(), content(page)
    assert "default-src 'none'" in text
    assert not re.search(
        r"""(src|href)=["']?(https?:)?//|url\((?!#)|@import|fetch\(|XMLHttpRequest""", text.replace("${", "")
    )
    assert "hush" not in text
    assert data["final"] == {"test/loss": 0.125, "train/loss": None, "val/loss": 0.25}
    loss, rate = data["charts"]
    assert [line["name"] for line in loss["lines"]] == ["train", "val"]
    assert loss["lines"][0]["points"][30] == [30, None]
    assert loss["lines"][1]["points"] == [[59, 0.25]]
    assert rate["title"] == "lr-AdamW"
    assert [row["right"] for row in data["predictions"]["rows"]] == [False, True, True]
    assert data["predictions"]["rows"][1]["input"]["image"].startswith("data:image/png;base64,")
    assert data["predictions"]["rows"][2]["input"]["image"] is None  # outside of the folder
    assert [picture["title"] for picture in data["pictures"]] == ["val/samples/step=1"]
    assert ["model.dim", "3"] in data["config"]
    assert ["git.commit", "abc"] in data["provenance"]


def test_long_curves_are_thinned_but_keep_their_extremes() -> None:
    points = [(float(step), 1.0 if step != 70_001 else 99.0) for step in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 2
    assert (70_001.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:5]) == points[:5]
    assert charts({}) == []
    assert read_series(Path("nowhere.csv")) == {}


def browse(page: Path, *words: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", *words]
    done = subprocess.run([*command, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPT = """
<script>
addEventListener("load", function probe() {
  if (!document.querySelector(".chart svg path")) return setTimeout(probe, 20);
  const said = {}, pick = query => document.querySelector(query), all = query => [...document.querySelectorAll(query)];
  const svg = pick(".chart svg"), box = svg.getBoundingClientRect();
  const at = (kind, share) => svg.dispatchEvent(new PointerEvent(kind, {
    clientX: box.left + box.width * share, clientY: box.top + 50, pointerId: 1, button: 0, bubbles: true }));
  svg.setPointerCapture = () => {};
  const ticks = () => [...svg.querySelectorAll("text[text-anchor=middle]")].map(node => Number(node.textContent));
  said.wide = Math.max(...ticks()) - Math.min(...ticks());
  at("pointermove", 0.5);
  said.tip = pick(".chart .tip").textContent;
  at("pointerdown", 0.4); at("pointermove", 0.6); at("pointerup", 0.6);
  said.narrow = Math.max(...ticks()) - Math.min(...ticks());
  svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
  said.again = Math.max(...ticks()) - Math.min(...ticks());
  const lines = () => svg.querySelectorAll("path").length;
  said.before = lines(); pick(".chart .legend button").click(); said.after = lines();
  pick(".chart .legend button").click();
  const boxes = all("input[type=checkbox]");
  boxes[0].click(); said.logarithmic = [...svg.querySelectorAll("text[text-anchor=end]")].map(node => node.textContent);
  boxes[1].click(); said.errors = all("#predictions tbody tr").filter(row => !row.hidden).length;
  boxes[1].click();
  const search = pick("#predictions input[type=search]");
  search.value = "\\u7532"; search.oninput();
  said.found = all("#predictions tbody tr").filter(row => !row.hidden).length;
  said.bold = all("b").filter(node => node.textContent === "bold").length;
  said.title = document.title; said.heading = pick("h1").textContent;
  said.first = pick("#predictions tbody td").textContent;
  said.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
  said.back = getComputedStyle(document.body).backgroundColor;
  said.network = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length;
  document.body.replaceChildren(document.createTextNode("RESULT" + JSON.stringify(said) + "END"));
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Hover, zoom, hiding, searching; hostile texts stay texts; light and dark, narrow and wide."""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text() + SCRIPT)
    backs = []
    for words in (["--window-size=1280,900"], ["--window-size=500,900", "--blink-settings=preferredColorScheme=0"]):
        found = re.search(r"RESULT(\{.*\})END", browse(probe, "--dump-dom", *words))
        assert found is not None
        said = json.loads(found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
        assert re.search(r"step \d+train [\d.]+val 0.25 \(step 59\)", said["tip"]), said["tip"]
        assert said["narrow"] < 0.5 * said["wide"]
        assert said["again"] == said["wide"]
        assert (said["before"], said["after"]) == (1, 0)
        assert "0.1" in said["logarithmic"]
        assert (said["errors"], said["found"]) == (1, 1)
        assert said["bold"] == 0
        assert said["title"] == said["heading"] == f"tiny {ATTACK}"
        assert said["first"] == "✗ wrong"
        assert not said["overflow"]
        assert said["network"] == 0
        backs.append(said["back"])
    assert backs == ["rgb(245, 246, 248)", "rgb(18, 21, 27)"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run=nowhere"], "run=nowhere: no config.yaml there"),
        ([], "run=FOLDER is missing"),
        (["push", "family=imagin"], "family=imagin: no such family; did you mean imaging?"),
        (["push", "famly=imaging"], "famly=imaging: no such word"),
        (["push"], "no key for W&B: run `wandb login` or set WANDB_API_KEY"),
    ],
)
def test_wrong_words(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert cli.main(["dashboard", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_record_has_no_terminal_view(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["dashboard", f"run={page.parent}", "view=terminal"]) == 2
    assert "W&B recorded nothing there" in capsys.readouterr().err
    assert cli.main(["dashboard", f"run={page.parent}", "view=picture"]) == 2


def test_workspaces_by_their_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert cli.main(["dashboard", "show", "project=mine"]) == 0
    views = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [view["displayName"] for view in views] == [f"kexue: {family.title}" for family in FAMILIES.values()]
    for view, (name, family) in zip(views, FAMILIES.items(), strict=True):
        assert view["project"] == "mine"
        sections = {section["name"]: section for section in view["spec"]["section"]["panelBankConfig"]["sections"]}
        assert list(sections)[:3] == ["Scores", "Loss", "Predictions"]
        plots = [panel["config"] for panel in sections["Scores"]["panels"]]
        assert [plot["metrics"] for plot in plots] == [[key] for key in family.scores]
        assert {plot["xAxis"] for plot in plots} == {"trainer/global_step"}
        text = json.dumps(view)
        assert '"family"' in text
        assert f'"{name}"' in text
        assert "test/predictions" in text


def test_what_workspaces_show_is_logged() -> None:
    """Keys of the families are those that the models log."""
    from kexue.nn.decoding import EventScores

    imaging = Path(cli.__file__).parents[1] / "lightning_modules" / "imaging" / "digits_multitask.py"
    logged = {f"val/{name}" for name in EventScores().compute()}
    assert set(FAMILIES["extraction"].scores) <= logged
    text = imaging.read_text()
    assert all(f'"{score.partition("/")[2]}"' in text for score in FAMILIES["imaging"].scores)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    import wandb

    wandb.teardown()
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        wandb.teardown()


def test_push(server: WandbServer, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces")
    assert cli.main(["dashboard", "push", "family=imaging", "project=mine"]) == 0
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "mine", "kexue: Imaging")
    assert "val/digit_accuracy" in view["spec"]
    assert capsys.readouterr().out.startswith(f"imaging: {server.url}/me/mine?nw=")


def test_push_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["dashboard", "push"]) == 2
    assert "pip install wandb-workspaces" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
def test_terminal_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb leet` draws the run in a terminal; `q` leaves it."""
    from kexue.callbacks import wandb_logger

    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_run(tmp_path / "run")
    logger = wandb_logger(folder, name="tiny")
    for step in range(20):
        logger.log_metrics({"train/loss": 1.0 / (step + 1)}, step)
    logger.mark_preempting()
    socket, screen = str(tmp_path / "tmux"), ""
    environment = {**os.environ, "TERM": "xterm-256color", "HOME": str(tmp_path)}
    command = f"{sys.executable} -m kexue.cli dashboard run={folder}"
    tmux = ["tmux", "-S", socket]
    subprocess.run([*tmux, "new-session", "-d", "-x", "150", "-y", "45", command], env=environment, check=True)
    try:
        for _ in range(240):
            time.sleep(0.5)
            screen = subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True).stdout
            if "train/loss" in screen:
                break
        assert "train/loss" in screen, screen
    finally:
        subprocess.run([*tmux, "kill-server"])
    assert (folder / "report.html").is_file()
