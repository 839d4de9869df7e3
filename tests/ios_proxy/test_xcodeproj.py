"""The app's project and property lists, as far as they can be read without Xcode."""

from __future__ import annotations

import plistlib
import re
from typing import Any

import pytest
from openstep_parser import OpenStepDecoder

from mpgpt_ios.pairing import SCHEME
from tests.support.launch import ROOT

NODE = ROOT / "ios_proxy" / "GPT2Node"
APP = NODE / "App"
PROJECT = APP / "GPT2Node.xcodeproj" / "project.pbxproj"
LINK = re.compile(r"[0-9A-F]{24}")
MANIFEST = (NODE / "Package.swift").read_text()

APPLES = {
    "FileTimestamp": (r"\bl?stat\(|\.modificationDate|\bfstat\(", "C617.1"),
    "DiskSpace": (r"statv?fs\(|volumeAvailableCapacity|systemFreeSize", "E174.1"),
    "SystemBootTime": (r"systemUptime|mach_absolute_time", "35F9.1"),
    "UserDefaults": (r"UserDefaults|@AppStorage|@SceneStorage", "CA92.1"),
    "ActiveKeyboards": (r"activeInputModes", "54BD.1"),
}
"""Apple's categories of interfaces that want a reason: how Swift uses them, and the reason that would be ours."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with PROJECT.open(encoding="utf-8") as file:
        parsed: dict[str, Any] = OpenStepDecoder.ParseFromFile(file)
    return parsed


def of_kind(project: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in project["objects"].values() if entry["isa"] == kind]


def links(value: object) -> set[str]:
    """Every identifier in a value."""
    if isinstance(value, dict):
        return set[str]().union(*(links(each) for each in value.values()))
    if isinstance(value, list):
        return set[str]().union(*map(links, value))
    return set(LINK.findall(str(value)))


def settings(project: dict[str, Any]) -> list[dict[str, Any]]:
    """What holds for the app, in each of its configurations."""
    (target,) = of_kind(project, "PBXNativeTarget")
    objects = project["objects"]
    layers = [of_kind(project, "PBXProject")[0], target]
    named = [
        {objects[each]["name"]: objects[each]["buildSettings"] for each in configurations["buildConfigurations"]}
        for configurations in (objects[layer["buildConfigurationList"]] for layer in layers)
    ]
    return [named[0][name] | named[1][name] for name in ("Debug", "Release")]


def test_every_object_is_there_and_wanted(project: dict[str, Any]) -> None:
    objects = project["objects"]
    used = set[str]().union(*(links(entry) for entry in objects.values())) | {project["rootObject"]}
    assert used == set(objects)
    assert (project["objectVersion"], objects[project["rootObject"]]["isa"]) == ("77", "PBXProject")


def test_every_path_is_there(project: dict[str, Any]) -> None:
    for entry in project["objects"].values():
        if entry.get("sourceTree") == "<group>" and "path" in entry:
            assert (APP / entry["path"]).exists(), entry["path"]
    (package,) = of_kind(project, "XCLocalSwiftPackageReference")
    assert (APP / package["relativePath"] / "Package.swift").samefile(NODE / "Package.swift")
    (folder,) = of_kind(project, "PBXFileSystemSynchronizedRootGroup")
    assert any((APP / folder["path"]).glob("*.swift")) and not any((APP / folder["path"]).glob("*.plist"))


def test_the_app_has_every_module_that_it_imports(project: dict[str, Any]) -> None:
    linked = {entry["productName"] for entry in of_kind(project, "XCSwiftPackageProductDependency")}
    imported = {
        module
        for source in (APP / "Sources").glob("*.swift")
        for module in re.findall(r"^import (MPGPT\w+)", source.read_text(), re.MULTILINE)
    }
    assert linked == imported
    assert all(f'.library(name: "{module}"' in MANIFEST for module in linked)


def test_settings(project: dict[str, Any]) -> None:
    for each in settings(project):
        assert (each["IPHONEOS_DEPLOYMENT_TARGET"], each["SWIFT_VERSION"]) == ("18.0", "6.0")
        assert (each["CODE_SIGN_STYLE"], each["DEVELOPMENT_TEAM"]) == ("Automatic", ""), "a free team signs it"
        assert not [name for name in each if "ENTITLEMENTS" in name]
        assert (APP / each["INFOPLIST_FILE"]).is_file() and each["TARGETED_DEVICE_FAMILY"] == "2"


def test_info() -> None:
    info = plistlib.loads((APP / "Info.plist").read_bytes())
    (kind,) = info["CFBundleURLTypes"]
    assert kind["CFBundleURLSchemes"] == [SCHEME]
    assert info["UIApplicationSceneManifest"] == {"UIApplicationSupportsMultipleScenes": False}
    assert info["UILaunchScreen"] == {} and info["ITSAppUsesNonExemptEncryption"] is False
    assert info["UIFileSharingEnabled"] is info["LSSupportsOpeningDocumentsInPlace"] is True
    assert 'additionalInfoPlistContentFilePath: "App/Info.plist"' in MANIFEST
    assert 'path: "App/Sources"' in MANIFEST


def test_privacy_is_declared_where_it_is_used_and_nowhere_else() -> None:
    declared = plistlib.loads((APP / "Sources" / "PrivacyInfo.xcprivacy").read_bytes())
    reasons = {
        entry["NSPrivacyAccessedAPIType"].removeprefix("NSPrivacyAccessedAPICategory"): entry[
            "NSPrivacyAccessedAPITypeReasons"
        ]
        for entry in declared["NSPrivacyAccessedAPITypes"]
    }
    folders = [NODE / "Sources" / name for name in ("MPGPTWire", "MPGPTNode", "MPGPTCoreML")] + [APP / "Sources"]
    code = "\n".join(path.read_text() for folder in folders for path in folder.glob("*.swift"))
    assert reasons == {name: [reason] for name, (pattern, reason) in APPLES.items() if re.search(pattern, code)}
    assert declared["NSPrivacyTracking"] is False and not declared["NSPrivacyCollectedDataTypes"]


def test_the_app_has_nothing_that_only_apple_can_check() -> None:
    for source in (APP / "Sources").glob("*.swift"):
        assert not re.search(r"#selector|@objc|os\(iOS\)", source.read_text()), source.name


def test_what_the_readme_archives_is_what_an_ipad_builds() -> None:
    """Of the targets that are there on an iPad, and of the app, every folder is in the archive; no link is."""
    readme = (ROOT / "ios_proxy" / "README.md").read_text()
    (named,) = re.findall(r"^git -C ios_proxy/GPT2Node archive .* HEAD (.*)$", readme, re.MULTILINE)
    assert named.split() == ["Package.swift", "Sources", "App"]
    for path in (path for name in named.split() for path in (NODE / name).rglob("*")):
        assert not path.is_symlink(), path
    before, _, shared = MANIFEST.partition("let package =")
    ipad = before.partition("#if canImport(AppleProductTypes) && os(iOS)")[2].partition("#else")[0]
    assert "mpgpt-node" not in ipad and "Tests" not in ipad + shared
    assert set(re.findall(r'"(MPGPT\w+)"', ipad)) <= set(re.findall(r'\.target\(name: "(\w+)"', shared))
