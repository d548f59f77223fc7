"""Who comes in, and what keeps everybody else out. Asked over HTTP, without a browser."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from operator_site import Site
from person import Person
from scene import PERSON_PASSWORD, Clock, add_image, add_person, break_a_row

from repave.domain.model import Role


@pytest.fixture
def ann(site: Site) -> Person:
    person = Person(site.url)
    assert person.log_in().status_code == 303
    return person


def user(site: Site, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {"REPAVE_ENDPOINT": site.url, "REPAVE_TOKEN": site.tokens["admin"], "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-m", "repave.cli.main", "user", *words], input=stdin, env=env, capture_output=True, text=True, timeout=60)


def test_a_person_is_added_logs_in_is_listed_and_is_out_at_once_when_removed(site: Site) -> None:
    made = user(site, "add", "eve", "--role", "operator", "--password-stdin", stdin="eves-own-long-secret\n")
    assert (made.returncode, made.stdout) == (0, "eve  operator\n"), made.stderr
    eve = Person(site.url)
    assert eve.log_in("eve", "eves-own-long-secret").headers["location"] == "/"
    assert eve.get("/").status_code == 200
    listed = json.loads(user(site, "ls", "--json").stdout)["items"]
    assert ("eve", "operator") in {(u["name"], u["role"]) for u in listed}
    assert user(site, "rm", "eve").returncode == 0
    assert eve.get("/").headers["location"] == "/login"
    types = [e["type"] for e in site.ask("GET", "/events").json()["items"]]
    assert {"user.added", "user.logged-in", "user.removed"} <= set(types)


def test_a_password_is_stored_as_an_argon2id_hash_and_shown_nowhere(site: Site) -> None:
    assert user(site, "add", "eve", "--password-stdin", stdin="short\n").returncode == 3
    Person(site.url).log_in()
    found = site.store.people.find_user("ann")
    assert found is not None and found[1].startswith("$argon2id$")
    database = next(Path(str(site.store.engine.url.database)).parent.glob("repave.db*")).read_bytes()
    assert PERSON_PASSWORD.encode() not in database
    assert PERSON_PASSWORD not in site.ask("GET", "/users").text and "argon2" not in site.ask("GET", "/users").text


def test_only_an_admin_adds_people(site: Site) -> None:
    body = {"name": "eve", "role": "admin", "password": "eves-own-long-secret"}
    answers = [site.ask("POST", "/users", json=body, as_=role).status_code for role in ("viewer", "operator", "admin", "admin")]
    assert answers == [403, 403, 201, 409]


def test_a_person_sees_their_own_project_only(site: Site) -> None:
    site.add_server("db07")
    elsewhere = site.ask("POST", "/users", json={"name": "olga", "role": "admin", "password": "olgas-own-secret"}, as_="other")
    assert elsewhere.status_code == 201
    olga = Person(site.url)
    olga.log_in("olga", "olgas-own-secret")
    assert "db07" not in olga.get("/").text and olga.get("/s/db07").status_code == 404


OF = {"default": "web01", "other": "db07"}  # the server of each project


@pytest.fixture
def two_projects(site: Site) -> Iterator[Site]:
    site.add_server("web01")
    site.add_server("db07", project=site.other)
    add_person(site, "root", Role.ADMIN)
    yield site


def locks(site: Site) -> list[str | None]:
    """Why each project's server is locked."""
    found = [site.ask("GET", f"/servers/{server}", params={"project": project}).json()["lock"] for project, server in OF.items()]
    return [f"{lock['by']}: {lock['reason']}" if lock else None for lock in found]


def test_the_sites_admin_chooses_a_project_and_acts_in_the_one_that_the_page_shows(two_projects: Site) -> None:
    site, root = two_projects, Person(two_projects.url)
    root.log_in("root")
    home = root.get("/").text
    assert "Project <b>default</b>" in home and 'href="/?project=other"' in home and "web01" in home and "db07" not in home and "--project" not in home
    theirs = root.get("/?project=other").text
    assert "Project <b>other</b>" in theirs and 'data-live="/live/?project=other"' in theirs and "db07" in theirs and "web01" not in theirs
    assert "repave reinstall db07 --rehearse --project other" in root.get("/s/db07").text  # it is remembered
    assert root.get("/s/web01").status_code == 404
    form = root.form_token("/lock?servers=db07")
    assert "Project <b>default</b>" in root.get("/b?project=default").text  # in another window
    assert (root.get("/s/web01").status_code, root.get("/s/db07").status_code) == (200, 404)
    assert root.post("/lock", {"form": form, "servers": "web01", "reason": "not there"}).status_code == 404
    assert root.post("/lock", {"form": form, "servers": "db07", "reason": "theirs"}).headers["location"] == "/s/db07"
    assert locks(site) == [None, "root: theirs"]
    assert root.get("/s/db07").status_code == 200  # where they have just acted
    root.send("/lock", {"servers": "web01", "reason": "ours"}, page="/lock?servers=web01&project=default")
    assert locks(site) == ["root: ours", "root: theirs"]
    nowhere = root.get("/?project=nowhere")
    assert nowhere.status_code == 404 and "Log out" in nowhere.text


def test_who_has_one_project_sees_no_chooser_and_comes_into_no_other(two_projects: Site) -> None:
    site = two_projects
    site.ask("POST", "/users", json={"name": "olga", "role": "admin", "password": PERSON_PASSWORD}, as_="other")
    for name, own, foreign in (("vic", "default", "other"), ("ann", "default", "other"), ("olga", "other", "default")):
        person = Person(site.url)
        person.log_in(name)
        assert 'class="projects"' not in person.get("/").text and person.get(f"/?project={own}").status_code == 200
        for path in ("/?", f"/s/{OF[foreign]}?", f"/plan?servers={OF[foreign]}&", "/live/?"):
            assert person.get(f"{path}project={foreign}").status_code == 403, path
            assert person.get(f"{path}project=nowhere").status_code == 403, path  # as for one that there is
        person.session.cookies.set("repave-project", foreign)
        assert (person.get(f"/s/{OF[own]}").status_code, person.get(f"/s/{OF[foreign]}").status_code) == (200, 404)
        mac = person.form_token("/").partition(".")[0]
        theirs = {"default": site.project.id, "other": site.other.id}[foreign]
        assert person.post("/lock", {"form": f"{mac}.{theirs}", "servers": OF[foreign], "reason": "x"}).status_code == 403
    assert locks(site) == [None, None]


def test_the_cookie_is_for_http_and_this_site_only_and_its_token_is_in_the_database_as_a_hash(site: Site) -> None:
    person = Person(site.url)
    cookie = SimpleCookie(person.log_in().headers["set-cookie"].split(", repave-form")[0])["repave"]
    assert (cookie["httponly"], cookie["samesite"], cookie["path"], cookie["secure"]) == (True, "strict", "/", "")
    assert int(cookie["max-age"]) == 12 * 3600
    database = b"".join(p.read_bytes() for p in Path(str(site.store.engine.url.database)).parent.glob("repave.db*"))
    assert cookie.value.encode() not in database
    by_tls = Person(site.url)
    by_tls.session.headers["X-Forwarded-Proto"] = "https"  # uvicorn believes this machine's own proxies
    answer = by_tls.get("/login")
    assert "Secure" in answer.headers["set-cookie"]


def test_a_login_ends_after_twelve_hours_and_by_logging_out(site: Site, clock: Clock, ann: Person) -> None:
    clock.add(11 * 3600)
    assert ann.get("/").status_code == 200
    clock.add(2 * 3600)
    assert ann.get("/b?x=1").headers["location"] == "/login?next=%2Fb%3Fx%3D1"
    assert ann.get("/live/").status_code == 401
    ann.log_in()
    cookie = ann.session.cookies["repave"]
    assert ann.send("/logout", {}).headers["location"] == "/login"
    again = Person(site.url)
    again.session.cookies.set("repave", cookie)
    assert again.get("/").headers["location"] == "/login"


def test_a_wrong_name_and_a_wrong_password_are_told_in_the_same_words(site: Site) -> None:
    pages = []
    for name, password in (("ann", "wrong-wrong-wrong"), ("nobody", "wrong-wrong-wrong")):
        answer = Person(site.url).log_in(name, password)
        assert answer.status_code == 401 and password not in answer.text
        pages.append(re.sub(r'value="[^"]*"', "", answer.text))
    assert pages[0] == pages[1]


def test_guessing_is_slow_and_a_good_password_does_not_help_meanwhile(site: Site) -> None:
    person = Person(site.url)
    assert [person.log_in("ann", "wrong-wrong-wrong").status_code for _ in range(5)] == [401] * 5
    refused = person.log_in()
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 30
    assert person.log_in("vic").status_code == 303


def test_a_login_never_leads_elsewhere(site: Site) -> None:
    for where in ("//evil.invalid", "https://evil.invalid", "/\\evil.invalid", "javascript:alert(1)", "/a\r\nb"):
        assert Person(site.url).log_in(next=where).headers["location"] == "/", where
    assert Person(site.url).log_in("vic", next="//[").headers["location"] == "/"


def test_a_form_without_the_token_of_this_login_does_nothing(site: Site, ann: Person) -> None:
    site.add_server("web01")
    vic = Person(site.url)
    vic.log_in("vic")
    for token in ("", "0" * 64, vic.form_token("/")):
        answer = ann.post("/lock", {"form": token, "servers": "web01", "reason": "x"})
        assert (answer.status_code, "not from a page of yours" in answer.text) == (403, True)
    assert ann.post("/lock", {"form": ann.form_token("/")} | {f"f{n}": "x" for n in range(600)}).status_code == 400
    assert ann.post("/lock", {"form": "x" * 70_000}).status_code == 400
    stolen = Person(site.url).post("/login", {"form": ann.form_token("/"), "name": "ann", "password": PERSON_PASSWORD})
    assert stolen.status_code == 403
    assert site.ask("GET", "/servers/web01").json()["lock"] is None
    assert ann.send("/lock", {"servers": "web01", "reason": "mine"}).headers["location"] == "/s/web01"
    assert site.ask("GET", "/servers/web01").json()["lock"]["by"] == "ann"


ACTS: list[tuple[str, dict[str, Any]]] = [
    ("/lock", {"servers": "web01", "reason": "x"}), ("/s/web01/unlock", {}), ("/b/none/pause", {}), ("/b/none/resume", {}), ("/b/none/cancel", {}),
    ("/reinstall", {"servers": "web01", "words": "erase 1"}),
]  # fmt: skip


def test_a_viewer_changes_nothing(site: Site) -> None:
    site.add_server("web01")
    vic = Person(site.url)
    vic.log_in("vic")
    before = site.store.events.last_seq(site.project.id)
    for path, fields in ACTS:
        answer = vic.send(path, fields)
        assert (answer.status_code, "needs the role operator" in answer.text) == (403, True), path
    assert site.store.events.last_seq(site.project.id) == before


def test_every_answer_forbids_scripts_styles_frames_and_addresses_of_others(site: Site, ann: Person) -> None:
    site.add_server("web01")
    for path, status in (("/", 200), ("/b", 200), ("/s/web01", 200), ("/s/none", 404), ("/login", 200), ("/plan?servers=web01", 200), ("/b/none", 404)):
        answer = ann.get(path)
        policy = answer.headers["content-security-policy"]
        assert answer.status_code == status, path
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
        assert not re.search(r"""<script(?![^>]*\ssrc="/static/)|\sstyle=|\son[a-z]+=|(src|href)="(?!/|#)""", answer.text), path


def test_what_a_name_holds_is_text_and_no_html(site: Site, ann: Person) -> None:
    site.add_server("web01")
    site.ask("POST", "/servers/web01/lock", json={"reason": "<script>alert(1)</script>"})
    for path in ("/", "/s/web01", "/events", "/?q=<script>alert(1)</script>", "/s/<script>", "/plan?servers=<script>", '/?sel="><script>'):
        assert "<script>alert" not in ann.get(path).text and '"><script>' not in ann.get(path).text, path


def test_a_nodeset_of_a_billion_names_is_refused_before_it_is_made(site: Site, ann: Person) -> None:
    site.add_server("web01")
    for nodeset in ("a[1-999999999]", "a[1-9999]b[1-9999]", "a[0-9,1-" + "9" * 5000 + "]"):
        assert ann.get("/fold", params={"nodeset": nodeset}).status_code == 400
        assert ann.get("/plan", params={"servers": nodeset}).status_code == 400
        assert ann.get("/", params={"q": nodeset}).status_code == 200
    assert ann.get("/fold", params={"nodeset": "web[01-12,20-30]!web05"}).json()["nodeset"] == "web[01-04,06-12,20-30]"


def test_a_link_from_elsewhere_is_followed_once_more_from_here(site: Site) -> None:
    answer = Person(site.url).get("/b", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200 and 'http-equiv="refresh"' in answer.text


def test_all_files_are_ours_and_small(site: Site, ann: Person) -> None:
    add_image(site, "tiny")
    names = re.findall(r'"(/static/[^"]+)"', ann.get("/").text)
    sizes = {name: len(ann.get(name).content) for name in names}
    assert len(sizes) >= 5 and sum(sizes.values()) < 150_000
    assert all("immutable" in ann.get(name).headers["cache-control"] for name in sizes)
    for name in ("..%2fdoor.py", "../door.py", "door.py", "nothing.css", "%2e%2e/x.css"):
        assert ann.get(f"/static/{name}").status_code == 404


# ---- our own fault ----


@contextlib.contextmanager
def away(site: Site) -> Iterator[None]:
    """The database can not be opened any more, and is back at the end."""
    database = Path(str(site.store.engine.url.database))
    site.store.engine.dispose()
    files = list(database.parent.glob("repave.db*"))  # without connections the file alone is left
    for file in files:
        file.rename(file.with_name(f"away-{file.name}"))
    database.mkdir()
    try:
        yield
    finally:
        site.store.engine.dispose()
        database.rmdir()
        for file in files:
            file.with_name(f"away-{file.name}").rename(file)


def test_what_nobody_foresaw_is_a_page_that_says_it_is_our_fault_and_names_the_line_of_the_log(
    site: Site, ann: Person, capsys: pytest.CaptureFixture[str]
) -> None:
    site.add_server("web01")
    break_a_row(site)
    capsys.readouterr()
    answer = ann.get("/")
    request_id = answer.headers["x-request-id"]
    assert (answer.status_code, answer.headers["content-type"]) == (500, "text/html; charset=utf-8")
    for text in (
        "our fault, not yours",
        "Repave made a mistake",
        request_id,
        "repave doctor",
        "repave case",
        "it changes nothing",
        "Log out",
        ">Try it again<",
    ):
        assert text in answer.text, text
    said = answer.text + str(answer.headers)
    assert not re.search("Traceback|canary-state|ValueError|\\.py|SELECT|instances", said)
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    log = capsys.readouterr()
    [line] = [line for line in (log.out + log.err).splitlines() if request_id in line]
    assert "request failed" in line and "canary" not in line
    changing = ann.post("/lock", {"form": ann.form_token("/events"), "servers": "web01", "reason": "x"})
    assert (changing.status_code, "before you ask for it again" in changing.text) == (500, True)
    own = site.ask("GET", "/servers")
    assert (own.status_code, own.json()["code"], own.headers["content-type"]) == (500, "Repave.9001", "application/problem+json")


def test_without_a_database_every_page_says_so_and_it_goes_on_when_it_is_back(site: Site, ann: Person) -> None:
    site.add_server("web01")
    with away(site):
        for path in ("/", "/b", "/live/", "/plan?servers=web01"):
            answer = ann.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "10"), path
            assert "The database can not be used now" in answer.text and "repave doctor" in answer.text and answer.headers["x-request-id"] in answer.text
            assert not re.search("Traceback|sqlite|OperationalError|\\.db", answer.text), path
        assert ann.get("/errors/Repave.9024").status_code == 200  # what it means can be read
        stranger = Person(site.url)
        assert stranger.get("/login").status_code == 200
        refused = stranger.log_in()
        assert (refused.status_code, PERSON_PASSWORD in refused.text) == (503, False)
        assert site.ask("GET", "/servers").json()["code"] == "Repave.9024"
    assert ann.get("/").status_code == 200
