"""Who may do what: roles, the policy file that binds them to subjects, and the one judge of both.

A role is a rule over permissions (`noun.verb`). What the built-in ones give follows from the effect that each method
declares, so a new method needs no line here. A role is bound to a subject by its certificate (organisation
`virtfleet:{role}`), by the policy file, or by the local socket that the call came in on; a binding may hold for name
prefixes only, and then reads `role@prefix` in the caller's roles.

    [[binding]]
    subject = "spiffe://virtfleet.dev/user/ci"       # exact, or a prefix that ends with `*`
    role = "operator"
    names = ["nodes/n1/domains/ci-"]                 # absent: every name
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from virtfleet.type.v1 import method_pb2
from virtfleet_service import files, names
from virtfleet_service.errors import PermissionMissing, ReadOnlySocket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from virtfleet_service.call import Caller
    from virtfleet_service.methods import MethodFacts

HOST_PATHS: Final = "hostPaths.use"
"""Permission to name a path of the host in a spec."""

RAW_DEVICES: Final = "rawDevices.use"
"""Permission to give a device of the host to a guest."""

EXTRA_ARGUMENTS: Final = "extraArguments.use"
"""Permission to add arguments or environment to a hypervisor's command line."""

VIEWER: Final = "viewer"
OPERATOR: Final = "operator"
ADMIN: Final = "admin"
SERVICE: Final = "service"
"""The role of a service of the node that acts for itself: at start, when it releases what no resource holds."""

_READ_VERBS: Final = frozenset({"get", "list", "watch"})
# Reading these is as good as having them.
_SECRETS: Final = frozenset({"secrets.access", "secrets.open"})
_CONTENTS: Final = frozenset({"volumes.download"})
"""Reads that give away what tenants keep on their disks: more than looking at resources."""

_PRIVILEGED: Final = frozenset({HOST_PATHS, RAW_DEVICES, EXTRA_ARGUMENTS, *_SECRETS})
_PRIVILEGED_NOUNS: Final = frozenset({"debug", "channelz"})
# What makes or breaks the fleet itself.
_ADMIN_NOUNS: Final = frozenset(
    {"nodes", "certificates", "joinTokens", "roles", "roleBindings", "auditEntries", "servers", "policies"}
)
_CACHE_LIMIT: Final = 4096


class PolicyError(Exception):
    """The policy file does not parse or binds an unknown role."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Gives a role to a subject.

    Attributes:
        subject: Exact, or a prefix that ends with `*`.
        role: The role.
        names: The name prefixes that it holds for; empty: all.
    """

    subject: str
    role: str
    names: tuple[str, ...] = ()

    def holds_for(self, subject: str) -> bool:
        """Tell whether a subject is meant."""
        if self.subject.endswith("*"):
            return subject.startswith(self.subject[:-1])
        return subject == self.subject


class Authorizer:
    """Judges whether a caller may do something; decisions are cached by roles, prefixes and permission.

    Args:
        extra_roles: Rules of further roles, as functions of a permission.
    """

    def __init__(self, extra_roles: Mapping[str, Callable[[str], bool]] | None = None) -> None:
        self._roles: dict[str, Callable[[str], bool]] = {
            VIEWER: self._viewer,
            OPERATOR: self._operator,
            ADMIN: _everything,
            SERVICE: _everything,
            **(extra_roles or {}),
        }
        self._effects: dict[str, int] = {}
        self._bindings: tuple[Binding, ...] = ()
        self.generation = 0
        """How often the bindings have been replaced."""
        self._cache: dict[tuple[tuple[str, ...], tuple[str, ...], str], tuple[str, ...] | None] = {}

    @property
    def role_names(self) -> frozenset[str]:
        """The roles that a policy may bind: that of the node's own services is for them alone."""
        return frozenset(self._roles) - {SERVICE}

    def register(self, facts: MethodFacts) -> None:
        """Learn a permission and its effect from a method."""
        if facts.permission:
            self._effects[facts.permission] = max(facts.effect, self._effects.get(facts.permission, 0))
            self._cache.clear()

    def load_policy(self, path: Path) -> None:
        """Read the policy file in place of the bindings in force.

        Raises:
            PolicyError: It does not parse; the old bindings stay.
            OSError: It cannot be read; the old bindings stay.
        """
        try:
            text = files.read_kept(path).decode()
        except UnicodeDecodeError as error:
            raise PolicyError(f"byte {error.start} of the policy file is no UTF-8") from error
        self._bindings = tuple(parse_policy(text, self.role_names))
        self.generation += 1

    def bound_roles(self, subject: str) -> tuple[str, ...]:
        """Return the roles that the policy file gives a subject; `role@prefix` where it limits the names."""
        found: list[str] = []
        for binding in self._bindings:
            if binding.holds_for(subject):
                found += [f"{binding.role}@{prefix}" for prefix in binding.names] or [binding.role]
        return tuple(found)

    def prefixes(self, caller: Caller, permission: str) -> tuple[str, ...] | None:
        """Return the name prefixes for which a caller holds a permission; empty: every name; None: none at all."""
        if not permission:
            return ()
        key = (caller.roles, caller.name_prefixes, permission)
        try:
            return self._cache[key]
        except KeyError:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            decision = self._cache[key] = self._decide(caller, permission)
            return decision

    def _decide(self, caller: Caller, permission: str) -> tuple[str, ...] | None:
        scopes: set[str] = set()
        unlimited = False
        for role in caller.roles:
            name, _, prefix = role.partition("@")
            rule = self._roles.get(name)
            if rule is not None and rule(permission):
                unlimited = unlimited or not prefix
                scopes.add(prefix)
        if not scopes:
            return None
        if unlimited:
            return tuple(sorted(set(caller.name_prefixes)))
        if not caller.name_prefixes:
            return tuple(sorted(scopes))
        # Both limits hold: of two prefixes the longer one says what they have in common, if they have anything.
        both = {max(a, b, key=len) for a in scopes for b in caller.name_prefixes if a.startswith(b) or b.startswith(a)}
        return tuple(sorted(both)) or None

    def authorize(self, caller: Caller, permission: str, resource_name: str) -> None:
        """Check that a caller holds a permission on a resource.

        Raises:
            PermissionMissing: No role of the caller gives it there.
            ReadOnlySocket: The same on the local socket of viewers.
        """
        prefixes = self.prefixes(caller, permission)
        if prefixes is None or (prefixes and not resource_name.startswith(prefixes)):
            raise self.refusal(caller, permission, resource_name)

    def authorize_within(self, caller: Caller, permission: str, parent: str) -> None:
        """Check that a caller may hold a permission on something below a parent; each thing is judged later.

        Raises:
            PermissionMissing: No role of the caller gives it for anything there.
            ReadOnlySocket: The same on the local socket of viewers.
        """
        prefixes = self.prefixes(caller, permission)
        if prefixes is None or (prefixes and not any(_meet(parent, prefix) for prefix in prefixes)):
            raise self.refusal(caller, permission, parent)

    def authorize_lookup(self, caller: Caller, permission: str, name: str) -> None:
        """Check that a caller may hold a permission on what a name leads to, which may be called otherwise.

        The node of the name may be `-`, and its last segment a uid; what is found is judged by the handler, by its
        own name.

        Raises:
            PermissionMissing: No role of the caller gives it for anything there.
            ReadOnlySocket: The same on the local socket of viewers.
        """
        within = lookup_scope(name)
        if within != name or "-" in name.split("/"):
            self.authorize_within(caller, permission, within)
        else:
            self.authorize(caller, permission, name)

    def narrows(self, before: Caller, after: Caller, permission: str) -> bool:
        """Tell whether a caller, as it is now, lacks a permission on something that it had it on before."""
        had, has = self.prefixes(before, permission), self.prefixes(after, permission)
        if had is None or has == ():
            return False
        return has is None or not had or not all(prefix.startswith(has) for prefix in had)

    def refusal(self, caller: Caller, permission: str, resource_name: str) -> PermissionMissing | ReadOnlySocket:
        """Return the error that says what is missing."""
        where = f" on `{resource_name}`" if resource_name else ""
        if caller.subject == f"local:{VIEWER}" and self._effects.get(permission, RECORD) != NONE:
            return ReadOnlySocket(
                f"this socket is for reading: it does not give `{permission}`{where}; use that of operators",
                resource=resource_name,
                permission=permission,
                subject=caller.subject,
            )
        roles = ", ".join(caller.roles) or "none"
        return PermissionMissing(
            f"`{caller.subject}` lacks the permission `{permission}`{where}; its roles: {roles}",
            resource=resource_name,
            permission=permission,
            subject=caller.subject,
            roles=roles,
        )

    def permissions(self, caller: Caller) -> list[str]:
        """Return those of the permissions known here that a caller holds for some name, sorted."""
        known = {*self._effects, HOST_PATHS, RAW_DEVICES, EXTRA_ARGUMENTS}
        return sorted(permission for permission in known if self.prefixes(caller, permission) is not None)

    def _viewer(self, permission: str) -> bool:
        if permission in _PRIVILEGED:
            return False
        noun, _, verb = permission.partition(".")
        if noun in _PRIVILEGED_NOUNS:
            return False
        if permission in _CONTENTS:
            return False
        effect = self._effects.get(permission)
        return verb in _READ_VERBS if effect is None else effect == NONE

    def _operator(self, permission: str) -> bool:
        if permission in _PRIVILEGED:
            return False
        noun = permission.partition(".")[0]
        if noun in _PRIVILEGED_NOUNS or noun in _ADMIN_NOUNS:
            return self._viewer(permission)
        return True


NONE: Final = method_pb2.EFFECT_NONE
RECORD: Final = method_pb2.EFFECT_RECORD


def _everything(_permission: str) -> bool:
    return True


def lookup_scope(name: str) -> str:
    """Return what a name says of where the resource is that it leads to: a uid says nothing of the name."""
    return names.parent_of(name) if names.is_uid(names.id_of(name)) else name


def _meet(parent: str, prefix: str) -> bool:
    """Tell whether a name below a parent can begin with a prefix; `-` in the parent stands for any id."""
    want = prefix.split("/")
    have = [*parent.split("/")] if parent else []
    for index, part in enumerate(have):
        if index >= len(want):
            return True
        last = index == len(want) - 1
        if part != "-" and not (part.startswith(want[index]) if last else part == want[index]):
            return False
    return True


def parse_policy(text: str, roles: Iterable[str]) -> list[Binding]:
    """Read the text of a policy file.

    Args:
        text: TOML.
        roles: The roles that exist.

    Raises:
        PolicyError: It does not parse, has an unknown key, or binds an unknown role.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"the policy file is not TOML: {error}") from error
    except RecursionError as error:
        raise PolicyError("the policy file is nested too deep") from error
    unknown = set(document) - {"binding"}
    if unknown:
        raise PolicyError(f"the policy file has unknown keys: {', '.join(sorted(unknown))}")
    known = frozenset(roles)
    found = []
    entries = document.get("binding", [])
    if not isinstance(entries, list):
        raise PolicyError("`binding` must be an array of tables: [[binding]]")
    for number, entry in enumerate(entries, 1):
        found.append(_binding(entry, f"binding {number}", known))
    return found


def _binding(entry: object, where: str, roles: frozenset[str]) -> Binding:
    if not isinstance(entry, dict):
        raise PolicyError(f"{where} is not a table")
    unknown = set(entry) - {"subject", "role", "names"}
    if unknown:
        raise PolicyError(f"{where} has unknown keys: {', '.join(sorted(unknown))}")
    subject, role, prefixes = entry.get("subject"), entry.get("role"), entry.get("names", [])
    if not isinstance(subject, str) or not subject:
        raise PolicyError(f"{where} has no subject")
    if role not in roles:
        raise PolicyError(f"{where} binds the unknown role `{role}`; there are {', '.join(sorted(roles))}")
    if not isinstance(prefixes, list) or not all(isinstance(prefix, str) and prefix for prefix in prefixes):
        raise PolicyError(f"{where}: `names` must be a list of name prefixes")
    if "names" in entry and not prefixes:
        # An empty list would read as "nothing" to a person and as "everything" to a program.
        raise PolicyError(f"{where}: `names` is empty; leave it out to mean every name")
    return Binding(subject, role, tuple(prefixes))
