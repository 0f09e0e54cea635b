# SPDX-License-Identifier: GPL-3.0-or-later
"""What wins, where things are, and that a mistake is told in one line that names file, key and what was expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from node_manager.settings import Settings, SettingsError, home_directory, load_settings

TYPES: dict[str, Any] = {"node_types": {"server": {"description": "Server"}}}


class Folder:
    """A folder with a config.json and a node_types.json."""

    def __init__(self, path: Path) -> None:
        self.config = path / "config.json"
        self.types = path / "node_types.json"
        self.home = path / "state"
        self.write({})
        self.types.write_text(json.dumps(TYPES))

    def write(self, configuration: Any) -> None:
        """Write config.json: text as it is, anything else as JSON."""
        text = configuration if isinstance(configuration, str) else json.dumps(configuration)
        self.config.write_text(text, "utf-8")

    def load(self, **environ: str) -> Settings:
        """Load with these variables."""
        return load_settings({"NODE_MANAGER_HOME": str(self.home), **environ}, self.config)

    def refusal(self, **environ: str) -> str:
        """Give what a load says that must fail."""
        with pytest.raises(SettingsError) as caught:
            self.load(**environ)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Give a folder with an empty configuration."""
    return Folder(tmp_path)


# what wins


def test_load_settings_of_an_empty_file_gives_defaults(folder: Folder) -> None:
    settings = folder.load()

    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 8080)
    assert settings.configuration.auth.enabled
    assert set(settings.node_types) == {"server"}


def test_load_settings_takes_the_file_over_defaults(folder: Folder) -> None:
    folder.write({"server": {"port": 1}})

    assert folder.load().server.port == 1


def test_load_settings_takes_the_environment_over_the_file(folder: Folder) -> None:
    folder.write({"server": {"port": 1, "host": "::1"}})

    server = folder.load(NODE_MANAGER_SERVER__PORT="9090").server

    assert (server.port, server.host) == (9090, "::1")


@pytest.mark.parametrize(
    ("name", "text", "section", "key", "expected"),
    [
        ("NODE_MANAGER_SERVER__HOST", "0.0.0.0", "server", "host", "0.0.0.0"),
        ("NODE_MANAGER_AUTH__ENABLED", "false", "auth", "enabled", False),
        ("NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS", "1.5", "monitoring", "gather_interval_seconds", 1.5),
        ("NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS", "15", "monitoring", "gather_interval_seconds", 15),
        ("NODE_MANAGER_SSH__DEFAULT_CREDENTIAL", "null", "ssh", "default_credential", None),
        ("NODE_MANAGER_SSH__USER", '"123"', "ssh", "user", "123"),
        ("node_manager_ssh__user", "me", "ssh", "user", "root"),
    ],
    ids=["text", "boolean", "number", "whole-number", "null", "quoted-number", "lower-case-is-not-ours"],
)
def test_load_settings_reads_variables(
    folder: Folder, name: str, text: str, section: str, key: str, expected: Any
) -> None:
    settings = folder.load(**{name: text})

    assert getattr(getattr(settings.configuration, section), key) == expected


def test_load_settings_lays_single_keys_over_a_section_given_whole(folder: Folder) -> None:
    settings = folder.load(
        NODE_MANAGER_SSH__CREDENTIALS__B__USER="late",
        NODE_MANAGER_SSH__CREDENTIALS__B__PRIVATE_KEY_FILE="/b",
        NODE_MANAGER_SSH__CREDENTIALS='{"a": {"private_key_file": "/a"}}',
    )

    credentials = settings.configuration.ssh.credentials
    assert {name: (found.user, str(found.private_key_file)) for name, found in credentials.items()} == {
        "a": (None, "/a"),
        "b": ("late", "/b"),
    }


def test_load_settings_finds_the_file_by_variable(folder: Folder) -> None:
    folder.write({"server": {"port": 7}})

    settings = load_settings({"NODE_MANAGER_CONFIG": str(folder.config)})

    assert (settings.server.port, settings.config_file) == (7, folder.config)


def test_load_settings_finds_node_types_beside_the_file(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "types.json").write_text(json.dumps({"node_types": {"x": {"description": "X"}}}))
    folder.write({"node_types_file": "more/types.json"})

    assert set(folder.load().node_types) == {"x"}


def test_load_settings_reads_what_is_shipped() -> None:
    settings = load_settings({})

    assert {"server", "edge-gateway", "edge-compute", "gpu-edge", "constrained"} <= set(settings.node_types)


# mistakes

MISTAKES: dict[str, tuple[Any, str]] = {
    "text-for-number": ({"server": {"port": "8080"}}, 'server.port: Input should be a valid integer, got "8080"'),
    "true-for-number": ({"server": {"port": True}}, "server.port: Input should be a valid integer, got true"),
    "fraction": ({"server": {"port": 80.5}}, "server.port: Input should be a valid integer, got 80.5"),
    "out-of-range": ({"server": {"port": 0}}, "server.port: Input should be greater than or equal to 1, got 0"),
    "text-for-boolean": ({"auth": {"enabled": "yes"}}, "auth.enabled: Input should be a valid boolean"),
    "number-for-text": ({"server": {"host": 5}}, "server.host: Input should be a valid string, got 5"),
    "zero-seconds": ({"storage": {"busy_timeout_seconds": 0}}, "storage.busy_timeout_seconds: Input should be greater"),
    "endless-seconds": ('{"auth": {"cache_seconds": Infinity}}', "auth.cache_seconds: Input should be a finite number"),
    "no-number": ('{"auth": {"cache_seconds": NaN}}', "auth.cache_seconds: Input should be"),
    "unknown-word": ({"logging": {"level": "loud"}}, "logging.level: Input should be 'debug', 'info', 'warning' or"),
    "unknown-key": ({"server": {"prot": 1}}, "server.prot: unknown key; see docs/configuration.md"),
    "unknown-section": ({"sever": {}}, "sever: unknown key"),
    "unknown-threshold": ({"thresholds": {"gpu_percent": {}}}, "thresholds.gpu_percent: unknown key"),
    "edges-swapped": (
        {"thresholds": {"cpu_percent": {"warning": 9, "critical": 8}}},
        "thresholds.cpu_percent: expected warning <= critical",
    ),
    "section-of-text": ({"server": "x"}, 'server: expected an object, got "x"'),
    "section-null": ({"server": None}, "server: expected an object, got null"),
    "list": ([], "(the whole file): expected an object, got []"),
    "number": (5, "(the whole file): expected an object, got 5"),
    "other-database": ({"storage": {"url": "mysql://x"}}, "storage.url: String should match pattern"),
    "path-of-number": ({"node_types_file": 5}, "node_types_file: expected the path of a file, got 5"),
    "missing-in-credential": (
        {"ssh": {"credentials": {"a": {}}}},
        "ssh.credentials.a.private_key_file: is missing",
    ),
    "unknown-default-credential": (
        {"ssh": {"default_credential": "a"}},
        "ssh.default_credential: expected one of ssh.credentials (none), got 'a'",
    ),
    "key-with-line-break": ({"a\nb": 1}, "a b: unknown key"),
    "two": ({"server": {"port": "a", "host": 1}}, "(and 1 more)"),
    "truncated": ('{"server": ', "not valid JSON"),
    "comment": ("// hello\n{}", "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "deep": ("[" * 200_000, "not valid JSON"),
}


@pytest.mark.parametrize(("configuration", "expected"), MISTAKES.values(), ids=MISTAKES)
def test_load_settings_refuses(folder: Folder, configuration: Any, expected: str) -> None:
    folder.write(configuration)

    text = folder.refusal()

    assert text.startswith(f"{folder.config}: ")
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("NODE_MANAGER_SERVER__PORT", "many", '(server.port): Input should be a valid integer, got "many"'),
        ("NODE_MANAGER_SERVER__PROT", "1", "(server.prot): unknown key"),
        ("NODE_MANAGER_SEVER__PORT", "1", "(sever): unknown key"),
        ("NODE_MANAGER_SSH__CREDENTIALS", '{"a": {}}', "(ssh.credentials.a.private_key_file): is missing"),
        ("NODE_MANAGER_NODE_TYPES_FILE__X", "1", ": node_types_file is not a section"),
        ("NODE_MANAGER_SERVER__PORT__X", "1", ": port is not a section"),
        ("NODE_MANAGER_AUTH__ENABLED", "no", "(auth.enabled): Input should be a valid boolean"),
        ("NODE_MANAGER_AUTH__CACHE_SECONDS", "NaN", "(auth.cache_seconds): Input should be"),
    ],
    ids=["type", "key", "section", "inside", "not-a-section", "too-deep", "boolean", "nan"],
)
def test_load_settings_names_the_variable_at_fault(folder: Folder, name: str, text: str, expected: str) -> None:
    folder.write({"server": {"port": 1}, "node_types_file": "node_types.json"})

    refusal = folder.refusal(**{name: text})

    assert refusal.startswith(f"{name}")
    assert expected in refusal
    assert "\n" not in refusal


def test_load_settings_names_the_file_where_another_variable_is_set(folder: Folder) -> None:
    folder.write({"server": {"host": 5}})

    assert folder.refusal(NODE_MANAGER_SERVER__PORT="1").startswith(f"{folder.config}: server.host")


def test_load_settings_names_a_missing_file(folder: Folder) -> None:
    folder.config.unlink()

    assert folder.refusal() == (
        f"{folder.config}: no such file; set NODE_MANAGER_CONFIG to your config.json or restore the one shipped"
    )


def test_load_settings_names_missing_node_types(folder: Folder) -> None:
    folder.types.unlink()

    assert folder.refusal().startswith(f"{folder.types}: no such file")


def test_load_settings_names_a_file_that_is_a_folder(folder: Folder) -> None:
    folder.config.unlink()
    folder.config.mkdir()

    assert folder.refusal() == f"{folder.config}: can't be read: Is a directory"


def test_load_settings_names_a_file_of_another_encoding(folder: Folder) -> None:
    folder.config.write_bytes(b'{"server": {"host": "\xff"}}')

    assert folder.refusal().startswith(f"{folder.config}: not valid JSON")


def test_load_settings_names_the_node_types_file_for_its_mistakes(folder: Folder) -> None:
    folder.types.write_text(json.dumps({"node_types": {"x": {"description": ""}}}))

    assert folder.refusal().startswith(f"{folder.types}: node_types.x.description: String should have at least 1")


# paths


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///node-manager.db", "sqlite:///{home}/node-manager.db"),
        ("sqlite:///sub/a.db", "sqlite:///{home}/sub/a.db"),
        ("sqlite:////srv/a.db", "sqlite:////srv/a.db"),
        ("postgresql+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
    ],
    ids=["relative", "folder", "absolute", "postgresql"],
)
def test_storage_url_starts_at_the_state_directory(folder: Folder, url: str, expected: str) -> None:
    folder.write({"storage": {"url": url}})

    assert folder.load().storage_url == expected.format(home=folder.home)


def test_home_directory_is_what_the_variable_says(tmp_path: Path) -> None:
    assert home_directory({"NODE_MANAGER_HOME": str(tmp_path)}) == tmp_path


def test_home_directory_expands_the_users_home() -> None:
    assert home_directory({"NODE_MANAGER_HOME": "~/nm"}) == Path.home() / "nm"


def test_home_directory_of_a_checkout_is_var() -> None:
    assert home_directory({}) == Path(__file__).parents[2] / "var"


# credentials and thresholds


@pytest.mark.parametrize(
    ("name", "expected"),
    [("plant", "{home}/keys/plant"), ("absolute", "/etc/key"), (None, "/etc/key"), ("unheard-of", None)],
    ids=["relative", "absolute", "default", "unknown"],
)
def test_credential_of_resolves_the_key_file(folder: Folder, name: str | None, expected: str | None) -> None:
    credentials = {"plant": {"private_key_file": "keys/plant"}, "absolute": {"private_key_file": "/etc/key"}}
    folder.write({"ssh": {"credentials": credentials, "default_credential": "absolute"}})

    credential = folder.load().credential_of(name)

    found = None if credential is None else str(credential.private_key_file)
    assert found == (expected and expected.format(home=folder.home))


def test_credential_of_nothing_configured_is_none(folder: Folder) -> None:
    assert folder.load().credential_of(None) is None


def test_thresholds_of_a_type_win_over_the_general_ones(folder: Folder) -> None:
    folder.write({"thresholds": {"cpu_percent": {"warning": 80}, "disk_percent": {"warning": 70, "critical": 90}}})
    folder.types.write_text(
        json.dumps({"node_types": {"x": {"description": "X", "thresholds": {"disk_percent": {"critical": 99}}}}})
    )
    settings = folder.load()

    assert settings.thresholds_of("x") == {"cpu_percent": {"warning": 80}, "disk_percent": {"critical": 99}}
    general = {"cpu_percent": {"warning": 80}, "disk_percent": {"warning": 70, "critical": 90}}
    assert [settings.thresholds_of(name) for name in (None, "unheard-of")] == [general, general]


def test_settings_are_frozen(folder: Folder) -> None:
    settings = folder.load()

    with pytest.raises(ValueError, match="frozen"):
        settings.server.port = 5  # type: ignore[misc]
