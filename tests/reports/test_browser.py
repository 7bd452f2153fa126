"""The page in a browser without a screen: nothing is fetched, nothing fails, the map answers."""

import re
from pathlib import Path

import numpy as np
import pytest
from browser import PROGRAM, Browser
from pictures import write_pictures
from runs import run_tiny

from moco.reports.page import write_report

pytestmark = pytest.mark.skipif(not PROGRAM, reason="there is no Chromium here")
CENTRE = """(() => {
  const place = document.getElementById("map-1"), view = place.view;
  place.scrollIntoView({block: "center"});
  const box = place.querySelector("canvas").getBoundingClientRect();
  const found = [];
  const visit = item => {
    if (item.datum && item.datum.name && item.mark && item.mark.marktype === "symbol") {
      let x = item.x, y = item.y;
      for (let group = item.mark.group; group; group = group.mark && group.mark.group) {
        x += group.x || 0; y += group.y || 0;
      }
      const [left, top] = view.origin(), room = view.padding();
      found.push([box.left + left + room.left + x, box.top + top + room.top + y, item.datum.name]);
    }
    for (const child of item.items || []) visit(child);
  };
  visit(view.scenegraph().root);
  return found;
})()"""
CHOOSE = """(() => {
  const choice = document.querySelector("#map-1 select");
  choice.value = "cluster";
  for (const kind of ["input", "change"]) choice.dispatchEvent(new Event(kind));
})()"""
TIP = "getComputedStyle(tip).display === 'none' ? '' : tip.innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("<script>alert(1)</script>".replace("/", "∕"), "b"):
            files = [f"{number}.png" for number in range(20)]
            write_pictures(folder / "set" / split / name, files, rng)
    options = ("--run.knn_every", "1", "--run.knn_k", "5")
    run_tiny(folder / "set", *options, run_dir=str(folder / "run"))
    return Path(write_report([folder / "run"])["report"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.parametrize("width,dark", [(1100, False), (1100, True), (400, False)])
def test_the_page_opens_without_errors_and_asks_for_nothing(page, browser, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.errors() == [] and browser.asked_for() == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    charts = "[...document.querySelectorAll('.chart')]"
    drawn = browser.run(f"{charts}.map(chart => !!chart.querySelector('canvas'))")
    assert len(drawn) > 5 and all(drawn)
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", paper))) < 60) == dark


@pytest.mark.parametrize("width", [1100, 400])
def test_the_cosine_of_a_neighbour_with_a_long_name_is_seen_whole(page, browser, width):
    browser.open(page, width)
    outside = """[...document.querySelectorAll("#neighbours figcaption b")].map(number =>
      number.getBoundingClientRect().right - number.closest("figure").getBoundingClientRect().right
    )"""
    found = browser.run(outside)
    assert len(found) > 8 and max(found) < 1


def test_the_map_answers_to_hover_and_to_its_choice(page, browser):
    browser.open(page)
    points = browser.run(CENTRE)
    assert len(points) == 40 and browser.run(TIP) == ""
    x, y, _ = points[0]
    browser.point_at(x, y)
    said = browser.run(TIP)
    near = [name for left, top, name in points if abs(left - x) + abs(top - y) < 12]
    assert any(name in said for name in near) and "cluster" in said
    thumb = "getComputedStyle(document.querySelector('.tip .thumb')).backgroundImage"
    assert browser.run(thumb).startswith('url("data:image/webp')
    browser.run(CHOOSE)
    assert browser.run("document.getElementById('map-1').view.signal('by')") == "cluster"
    assert browser.errors() == []
