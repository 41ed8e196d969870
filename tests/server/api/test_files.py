"""/v1/files, by the official client and by hand: nothing half, nothing of others, nothing as a whole in memory."""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import threading
import tracemalloc
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from openai.types import FileDeleted, FileObject

from ensemble_server.ensembles.errors import StorageBusyError
from ensemble_server.server.batch.uploads.catalogue import Catalogue
from tests.server.api.conftest import CHAT, asgi_client, live_server, until

LINES = b'{"custom_id": "a"}\n{"custom_id": "b"}\n'
KEYS = {"api_keys": ("first", "second")}


@asynccontextmanager
async def openai_client(hosting, key="none"):
    async with live_server(hosting) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:
        yield client


def upload(name="rows.jsonl", content=LINES, **fields):
    return {"files": {"file": (name, content)}, "data": {"purpose": "batch"} | fields}


async def uploaded(client, **kwargs):
    response = await client.post("/v1/files", **upload(**kwargs))
    assert response.status_code == 200, response.text
    return response.json()


def stored(hosting):
    """Names of what lies among the files."""
    return sorted(path.name for path in (hosting.config.batch_folder / "files").iterdir())


# --- as the official client uses it ------------------------------------------------------------------------------


async def test_the_client_uploads_lists_reads_and_deletes(host):
    async with openai_client(host()) as client:
        file = await client.files.create(file=("rows.jsonl", LINES), purpose="batch")
        FileObject.model_validate(file.model_dump(), strict=True)
        assert (file.filename, file.bytes, file.purpose) == ("rows.jsonl", len(LINES), "batch")
        assert file.expires_at - file.created_at == 30 * 24 * 3600
        assert await client.files.retrieve(file.id) == file
        assert [listed async for listed in client.files.list()] == [file]
        assert (await client.files.content(file.id)).content == LINES
        deleted = await client.files.delete(file.id)
        FileDeleted.model_validate(deleted.model_dump(), strict=True)
        with pytest.raises(openai.NotFoundError, match=file.id):
            await client.files.retrieve(file.id)
        assert [listed async for listed in client.files.list()] == []


async def test_the_client_asks_for_another_life_span(host):
    async with openai_client(host()) as client:
        file = await client.files.create(
            file=LINES, purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert file.expires_at - file.created_at == 3600


async def test_lists_are_paged_by_the_client_and_survive_deletion_on_the_way(host):
    async with openai_client(host()) as client:
        files = [await client.files.create(file=(f"{n}.jsonl", LINES), purpose="batch") for n in range(7)]
        names = [file.filename async for file in client.files.list(limit=3)]
        assert names == [f"{n}.jsonl" for n in reversed(range(7))]
        assert [file.filename async for file in client.files.list(limit=2, order="asc")] == names[::-1]
        assert [file.id async for file in client.files.list(after=files[2].id)] == [files[1].id, files[0].id]
        assert [file async for file in client.files.list(purpose="fine-tune")] == []
        async for file in client.files.list(limit=2):
            await client.files.delete(file.id)
        assert [file async for file in client.files.list()] == []


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "limit=x", "order=up"])
async def test_a_list_that_cannot_be_is_a_400(host, query):
    async with asgi_client(host()) as client:
        response = await client.get(f"/v1/files?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


# --- what is refused ---------------------------------------------------------------------------------------------


async def test_other_purposes_are_refused_by_name_and_leave_nothing(host):
    hosting = host()
    async with openai_client(hosting) as client:
        with pytest.raises(openai.BadRequestError, match=r'purpose: .*\'batch\'.* got "fine-tune"') as caught:
            await client.files.create(file=LINES, purpose="fine-tune")
    assert caught.value.param == "purpose"
    assert stored(hosting) == []


@pytest.mark.parametrize(
    ("kwargs", "status", "param"),
    [
        ({"files": {"file": ("a", LINES)}}, 400, "purpose"),
        ({"files": {"purpose": (None, b"batch")}}, 400, "file"),
        ({"files": {"file": (None, LINES), "purpose": (None, b"batch")}}, 400, "file"),
        ({"files": [("file", ("a", LINES)), ("file", ("b", LINES))], "data": {"purpose": "batch"}}, 400, "file"),
        (upload() | {"data": {"purpose": "batch", "expires_after[anchor]": "created_at"}}, 400, "expires_after"),
        (upload(**{"expires_after[seconds]": "5"}), 400, "expires_after[seconds]"),
        (upload() | {"data": {"purpose": "x" * 5000}}, 400, "purpose"),
        ({"json": {"purpose": "batch"}}, 415, None),
        ({"content": LINES}, 415, None),
        ({"content": LINES, "headers": {"content-type": "multipart/form-data"}}, 415, None),
        ({"content": LINES, "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, None),
        ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, None),
    ],
)
async def test_a_form_that_is_none_is_refused_and_leaves_nothing(host, kwargs, status, param):
    hosting = host()
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/files", **kwargs)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    assert stored(hosting) == []


async def test_an_upload_that_breaks_off_is_no_file(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        request = client.build_request("POST", "/v1/files", **upload(content=LINES * 100))
        body = await request.aread()
        response = await client.post("/v1/files", content=body[:-20], headers=request.headers)
    assert response.status_code == 400
    assert "ends before its last boundary" in response.json()["error"]["message"]
    assert stored(hosting) == []


async def test_a_client_that_hangs_up_leaves_nothing(host):
    hosting = host()

    async def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while True:
            yield b"x" * 1000
            await asyncio.sleep(0.01)

    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url) as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await client.post("/v1/files", content=endless(), headers=headers)
        await asyncio.sleep(0.2)
        assert stored(hosting) == []


async def test_a_file_beyond_the_limit_is_a_413_that_its_sender_gets_to_read(host):
    hosting = host()
    hosting.change("batch", max_file_bytes=1_000_000)
    async with openai_client(hosting) as client:
        exact = await client.files.create(file=b"x" * 1_000_000, purpose="batch")
        for size in (1_000_001, 3_000_000):
            with pytest.raises(openai.APIStatusError, match=r"1000000 bytes long \(batch.max_file_bytes\)") as caught:
                await client.files.create(file=b"x" * size, purpose="batch")
            assert caught.value.status_code == 413
            assert caught.value.code == "body_too_large"
    assert stored(hosting) == [exact.id]


async def test_a_page_of_another_origin_cannot_upload_behind_its_visitors_back(host):
    async with asgi_client(host({"cors_origins": ("https://page.example",)})) as client:

        async def status(origin):
            return (await client.post("/v1/files", **upload(), headers={"origin": origin})).status_code

        assert await status("https://evil.example") == 403
        assert await status("null") == 403
        assert await status("https://page.example") == 200
        assert await status("http://server") == 200


# --- what is kept ------------------------------------------------------------------------------------------------


async def test_nothing_is_written_before_the_first_upload(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        assert (await client.get("/v1/files")).json()["data"] == []
        assert (await client.get("/v1/files/file-1")).status_code == 404
        assert (await client.get("/v1/batches")).json()["data"] == []
        assert not hosting.config.batch_folder.exists()
        await uploaded(client)
    assert hosting.config.batch_folder.exists()


async def test_files_outlive_the_server_and_half_ones_do_not(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        file = await uploaded(client)
    for leftover in ("file-x.partial", "file-y"):
        (hosting.config.batch_folder / "files" / leftover).write_bytes(b"half")
    async with asgi_client(hosting) as client:
        assert (await client.get(f"/v1/files/{file['id']}")).json() == file
        assert (await client.get(f"/v1/files/{file['id']}/content")).content == LINES
    assert stored(hosting) == [file["id"]]


async def test_a_file_whose_time_is_over_is_gone(host):
    hosting = host()
    async with asgi_client(hosting) as client:
        old, young = await uploaded(client), await uploaded(client)
        with sqlite3.connect(hosting.config.batch_folder / "catalogue.sqlite") as db:
            db.execute("UPDATE files SET expires_at = 1 WHERE id = ?", [old["id"]])
        db.close()
        assert (await client.get(f"/v1/files/{old['id']}")).status_code == 404
        assert [file["id"] for file in (await client.get("/v1/files")).json()["data"]] == [young["id"]]
        assert len(stored(hosting)) == 2
    async with asgi_client(hosting):
        assert stored(hosting) == [young["id"]]


async def test_the_bytes_and_the_name_come_back_as_they_were_sent(host):
    content = bytes(range(256)) * 3000 + b"\r\n--not-the-boundary--\r\n"
    async with asgi_client(host()) as client:
        file = await uploaded(client, name="C:\\fake\\zwei Zeilen ü.jsonl", content=content)
        assert file["filename"] == "zwei Zeilen ü.jsonl"
        response = await client.get(f"/v1/files/{file['id']}/content")
    assert response.content == content
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"].startswith("attachment")


@pytest.mark.slow
async def test_a_large_file_passes_through_and_never_is_in_memory(host):
    hosting = host()
    size = 48 * 1024**2
    block = b"x" * 65536

    async def body():
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(size // len(block)):
            yield block
        yield b"\r\n--b--\r\n"

    async with live_server(hosting) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        await uploaded(client)  # what is loaded but once
        tracemalloc.start()
        try:
            headers = {"content-type": "multipart/form-data; boundary=b"}
            file = (await client.post("/v1/files", content=body(), headers=headers)).json()
            num_bytes = 0
            async with client.stream("GET", f"/v1/files/{file['id']}/content") as response:
                async for chunk in response.aiter_raw():
                    num_bytes += len(chunk)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert file["bytes"] == num_bytes == size
    assert peak < size / 4


async def test_a_full_disk_is_told_in_openais_shape_and_leaves_no_half_file(host):
    """The kernel refuses to let any file grow beyond 2 MB, as a full disk would."""
    hosting = host()
    async with openai_client(hosting) as client:
        small = await client.files.create(file=LINES, purpose="batch")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
        try:
            with pytest.raises(openai.InternalServerError, match="the file cannot be written") as caught:
                await client.files.create(file=b"x" * 5_000_000, purpose="batch")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
        assert stored(hosting) == [small.id]
        await client.files.create(file=b"x" * 5_000_000, purpose="batch")
    assert len(stored(hosting)) == 2


async def test_nobody_else_waits_for_a_catalogue_that_is_slow(host, monkeypatch):
    """Reading the request of a chat takes a thread, too: many more wait for the disk than the loop's pool has."""
    is_answered, asked = threading.Event(), []

    def slow(self, *arguments, **options):
        asked.append(arguments)
        is_answered.wait()
        return []

    monkeypatch.setattr(Catalogue, "files", slow)
    async with asgi_client(host()) as client:
        await uploaded(client)
        lists = [asyncio.create_task(client.get("/v1/files")) for _ in range(60)]
        await until(lambda: bool(asked))
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        is_answered.set()
        assert {response.status_code for response in await asyncio.gather(*lists)} == {200}


async def test_all_that_wait_for_a_held_catalogue_are_told_what_the_first_has_found(host, monkeypatch):
    may_fail, tries = threading.Event(), []

    def held(self, *arguments, **options):
        tries.append(arguments)
        may_fail.wait()
        raise StorageBusyError("another program holds it")

    monkeypatch.setattr(Catalogue, "files", held)
    async with asgi_client(host()) as client:
        await uploaded(client)
        lists = [asyncio.create_task(client.get("/v1/files")) for _ in range(20)]
        await until(lambda: client.app.state.batches.num_waiting == 20)
        may_fail.set()
        responses = await asyncio.gather(*lists)
        assert {(response.status_code, response.json()["error"]["code"]) for response in responses} == {
            (503, "storage_busy")
        }
        assert len(tries) == 1
        assert (await client.get("/v1/files")).status_code == 503  # who comes later tries anew
        assert len(tries) == 2


@pytest.mark.parametrize(("harm", "code"), [("held", "storage_busy"), ("damaged", "storage_damaged")])
async def test_a_server_that_finds_its_catalogue_unusable_chats_and_has_it_once_it_is_mended(host, harm, code):
    hosting = host()
    async with asgi_client(hosting) as client:
        file = await uploaded(client)
    catalogue = hosting.config.batch_folder / "catalogue.sqlite"
    whole = catalogue.read_bytes()
    holder = sqlite3.connect(catalogue, isolation_level=None)
    if harm == "held":
        holder.execute("BEGIN EXCLUSIVE")
    else:
        holder.close()
        catalogue.write_bytes(b"no database" * 1000)
    async with asgi_client(hosting) as client:
        responses = await asyncio.gather(*(client.post("/v1/files", **upload()) for _ in range(8)))
        assert {(r.status_code, r.json()["error"]["code"]) for r in responses} == {(503, code)}
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        if harm == "held":
            holder.execute("ROLLBACK")
        else:
            catalogue.write_bytes(whole)
        assert (await client.get(f"/v1/files/{file['id']}")).status_code == 200
    holder.close()


async def test_a_folder_that_cannot_be_made_is_told_without_its_path(host):
    hosting = host()
    hosting.config.batch_folder.write_text("a file in its place")
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/files", **upload())
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
    assert response.status_code == 507
    assert "batch.folder cannot be used" in response.json()["error"]["message"]
    assert str(hosting.config.batch_folder) not in response.text


async def test_a_second_server_has_no_files_until_the_first_is_gone_but_chats(host, caplog):
    one, other = host(), host()
    async with asgi_client(one) as first:
        file = await uploaded(first)
        async with asgi_client(other) as second:
            refused = await second.get(f"/v1/files/{file['id']}")
            assert (await second.post("/v1/chat/completions", json=CHAT)).status_code == 200
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "folder_in_use"
            assert "files and batches cannot be had" in caplog.text
            assert (await first.get(f"/v1/files/{file['id']}")).json() == file
    async with asgi_client(other) as second:
        assert (await second.get(f"/v1/files/{file['id']}")).json() == file


# --- whose it is -------------------------------------------------------------------------------------------------


async def test_a_key_sees_its_own_files_only(host):
    hosting = host(KEYS)
    async with asgi_client(hosting) as client:
        client.headers["authorization"] = "Bearer first"
        file = await uploaded(client)
        client.headers["authorization"] = "Bearer second"
        other = await uploaded(client)
        assert [listed["id"] for listed in (await client.get("/v1/files")).json()["data"]] == [other["id"]]
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            response = await client.request(method, f"/v1/files/{file['id']}{path}")
            unknown = await client.request(method, f"/v1/files/file-0{path}")
            assert response.status_code == unknown.status_code == 404
            assert response.text.replace(file["id"], "") == unknown.text.replace("file-0", "")
        del client.headers["authorization"]
        assert (await client.get(f"/v1/files/{file['id']}", headers={"x-api-key": "first"})).json() == file
        assert (await client.get(f"/v1/files/{file['id']}")).status_code == 401
    everything = b"".join(path.read_bytes() for path in hosting.config.batch_folder.glob("catalogue*"))
    assert file["id"].encode() in everything
    assert b"first" not in everything


async def test_an_id_is_never_a_path(host):
    async with asgi_client(host()) as client:
        await uploaded(client)
        for name in ("..%2Fcatalogue.sqlite", "../catalogue.sqlite", "%2e%2e%2flock", "catalogue.sqlite"):
            assert (await client.get(f"/v1/files/{name}/content")).status_code == 404
