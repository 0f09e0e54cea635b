# SPDX-License-Identifier: GPL-3.0-or-later
"""The running service against its own OpenAPI document: no 5xx, every answer as described."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
from observed import observation
from running_service import RunningService

EXAMPLES_PER_OPERATION = int(os.environ.get("NODE_MANAGER_SCHEMATHESIS_EXAMPLES", "15"))


def test_every_answer_conforms_to_the_openapi_document(own_service: RunningService, tmp_path: Path) -> None:
    own_service.command = (str(Path(__file__).with_name("service_without_ansible.py")),)
    own_service.start()
    with own_service.client() as api:
        api.post("/nodes", params={"look": "false"}, json={"node_id": "gw-7", "address": "127.0.9.7"})
        batch = [observation("gw-7", kind, "2026-01-01T00:00:00Z") for kind in ("facts", "sample", "report")]
        api.post("/observations", json={"observations": batch})

    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "schemathesis"),
            "run",
            f"{own_service.url}/openapi.json",
            "--header",
            f"Authorization: Bearer {own_service.token}",
            # A stream has no end; test_events.py holds it to its description.
            "--exclude-path",
            "/events",
            "--max-examples",
            str(EXAMPLES_PER_OPERATION),
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
            "response_headers_conformance,negative_data_rejection",
            "--seed",
            "1",
            "--request-timeout",
            "30",
            "--suppress-health-check",
            "all",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-20000:]


def test_documentation_page_needs_nothing_from_elsewhere(service: RunningService) -> None:
    page = httpx.get(f"{service.url}/docs").text

    assets = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page)
    assert len(assets) >= 2
    assert [asset for asset in assets if not asset.startswith("/")] == []
    assert {httpx.get(service.url + asset).status_code for asset in assets} == {200}


def test_document_describes_every_operation_with_examples(service: RunningService) -> None:
    document = httpx.get(f"{service.url}/openapi.json").json()

    undescribed = [
        f"{method} {path}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if not operation.get("description")
    ]

    assert undescribed == []
    assert document["components"]["schemas"]["Problem"]["required"] == ["type", "title", "status", "code", "detail"]
