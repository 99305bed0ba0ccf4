"""Every error this package raises on purpose. Each is also its standard-library kin, so callers may catch either.

    RegistryError
    ├── InvalidReference (ValueError)        a name that cannot name anything
    ├── InvalidManifest (ValueError)         a manifest or receipt that does not say what it must
    ├── InvalidAdapter (ValueError)          an adapter that is refused; .reasons lists why
    ├── InvalidArchive (ValueError)          a file that is no whole export of a registry
    ├── InvalidQuery (ValueError)            a search that cannot be read
    ├── NothingToRollBack (ValueError)       an alias without an earlier target
    ├── InvalidKey (ValueError)              a key or a signature that is none
    ├── NotProtected (ValueError)            an alias without a rule
    ├── NotApprovable (ValueError)           a version that whoever pushed it would approve
    ├── NotSigned (ValueError)               a version that lacks a signature that is wanted of it
    ├── RequirementNotMet (ValueError)       a version that lacks what its promotion requires
    ├── VersionInUse (ValueError)            a version that is not deleted, because aliases point to it
    ├── NotDeleted (ValueError)              a version that is not restored, because it is there
    ├── NumberTaken (ValueError)             a tag that names the number of another version
    ├── StaleParent (ValueError)             a commit that follows another one than it says
    ├── NotOffered (PermissionError)         an act of the Hub's that has no meaning here
    ├── NotFound (LookupError)               .ref, .nearest
    │   ├── UnknownAdapter
    │   ├── UnknownVersion
    │   ├── UnknownAlias
    │   ├── UnknownDigest
    │   ├── UnknownFile
    │   ├── NoDraft                          a name without files that wait to be published
    │   ├── NoVersion                        a name that has such files, and no version yet
    │   ├── UnknownToken
    │   └── DeletedVersion                   .version, .who, .at, .purged
    ├── InvalidRequest (ValueError)          an HTTP request that cannot be read; .param
    ├── TooLarge (ValueError)                more bytes than the registry takes
    ├── WrongOffset (ValueError)             an upload that goes on elsewhere than where it stopped; .received_bytes
    ├── MissingBlobs (LookupError)           files that a push names and nobody uploaded; .digests
    ├── BaseNotFound (FileNotFoundError)     the base model cannot be described
    ├── CorruptBlob (OSError)                bytes that are missing or are not what their digest says
    ├── FolderNotEmpty (FileExistsError)     a destination that holds something else
    ├── TooManyWatchers (OSError)            a server that takes no more who watch
    ├── RateLimited (OSError)                more requests than the registry server takes of one; .retry_after_seconds
    ├── SigningUnavailable (OSError)         signatures are asked for, and cryptography is not installed
    ├── StoreUnavailable (OSError)           a data directory that cannot be used
    └── RemoteError (OSError)                a registry server that cannot be reached or answers nonsense
        ├── Unauthorized (PermissionError)   the registry server wants another token
        └── Forbidden (PermissionError)      the token does not allow it

`code` is the word the HTTP face uses for the error; `remote` turns it back into the class.
"""

from collections.abc import Sequence


class RegistryError(Exception):
    """The root: catching it catches everything this package raises on purpose."""

    code = "registry_error"


class InvalidReference(RegistryError, ValueError):
    code = "invalid_reference"


class InvalidManifest(RegistryError, ValueError):
    code = "invalid_manifest"


class InvalidAdapter(RegistryError, ValueError):
    """An adapter that is refused. `reasons` holds every reason; the message shows the first few."""

    code = "adapter_refused"
    shown = 6

    def __init__(self, reasons: Sequence[str] | str) -> None:
        self.reasons = (reasons,) if isinstance(reasons, str) else tuple(reasons)
        more = len(self.reasons) - self.shown
        super().__init__("; ".join(self.reasons[: self.shown]) + (f"; and {more} more" if more > 0 else ""))


class NothingToRollBack(RegistryError, ValueError):
    code = "nothing_to_roll_back"


class InvalidArchive(RegistryError, ValueError):
    code = "invalid_archive"


class InvalidQuery(RegistryError, ValueError):
    code = "invalid_query"


class InvalidKey(RegistryError, ValueError):
    code = "invalid_key"


class NotProtected(RegistryError, ValueError):
    code = "not_protected"


class NotApprovable(RegistryError, ValueError):
    code = "not_approvable"


class NotSigned(RegistryError, ValueError):
    code = "not_signed"


class RequirementNotMet(RegistryError, ValueError):
    code = "requirement_not_met"


class VersionInUse(RegistryError, ValueError):
    code = "version_in_use"


class NotDeleted(RegistryError, ValueError):
    code = "not_deleted"


class NumberTaken(RegistryError, ValueError):
    code = "number_taken"


class StaleParent(RegistryError, ValueError):
    code = "stale_parent"


class NotOffered(RegistryError, PermissionError):
    code = "not_offered"


class InvalidRequest(RegistryError, ValueError):
    """`param` names the field or query parameter that is wrong, if it is one."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None) -> None:
        self.message, self.param = message, param
        super().__init__(message)


class TooLarge(RegistryError, ValueError):
    code = "too_large"


class WrongOffset(RegistryError, ValueError):
    code = "wrong_offset"

    def __init__(self, offset: int, received_bytes: int) -> None:
        self.offset, self.received_bytes = offset, received_bytes
        super().__init__(f"Upload-Offset is {offset}, expected {received_bytes}: so many bytes arrived before")


class MissingBlobs(RegistryError, LookupError):
    code = "blobs_missing"

    def __init__(self, digests: Sequence[str]) -> None:
        self.digests = tuple(digests)
        super().__init__(f"upload first: {', '.join(self.digests)}")


class NotFound(RegistryError, LookupError):
    """`ref` names nothing here; `nearest` is the closest thing that exists, or None."""

    code = "not_found"
    what = "entry"

    def __init__(self, ref: str, nearest: str | None = None) -> None:
        self.ref, self.nearest = ref, nearest
        super().__init__(f"no {self.what} '{ref}'" + (f"; the nearest is '{nearest}'" if nearest else ""))


class UnknownAdapter(NotFound):
    code = "adapter_not_found"
    what = "adapter"


class UnknownVersion(NotFound):
    code = "version_not_found"
    what = "version"


class UnknownAlias(NotFound):
    code = "alias_not_found"
    what = "alias"


class UnknownDigest(NotFound):
    code = "digest_not_found"
    what = "digest"


class UnknownFile(NotFound):
    code = "file_not_found"
    what = "file"


class NoDraft(NotFound):
    code = "no_draft"
    what = "unpublished files of"


class NoVersion(NotFound):
    """`ref` names a version of an adapter that has uploaded files, and none of them published."""

    code = "no_version"

    def __init__(self, ref: str, nearest: None = None) -> None:
        self.ref, self.nearest = ref, nearest
        LookupError.__init__(self, f"'{ref}' has no version yet: its files wait for a tag, or for registry publish")


class UnknownToken(NotFound):
    code = "token_not_found"
    what = "token"


class DeletedVersion(NotFound):
    """`ref` stands for `version`, which `who` deleted `at` a time; `purged`: its files are gone since."""

    code = "version_deleted"

    def __init__(self, ref: str, version: str, who: str, at: str, purged: bool = False, nearest: None = None) -> None:
        self.ref, self.version, self.who, self.at, self.purged, self.nearest = ref, version, who, at, purged, nearest
        back = "only a push of the same files brings it back" if purged else "to bring it back: registry restore "
        LookupError.__init__(self, f"'{ref}' was deleted by {who} at {at}; {back}{'' if purged else version}")


class BaseNotFound(RegistryError, FileNotFoundError):
    code = "base_not_found"


class CorruptBlob(RegistryError, OSError):
    """Stored bytes that are not what their digest says: `path` in the adapter, `digest`, `what` is wrong."""

    code = "corrupt_blob"

    def __init__(self, path: str, digest: str, what: str) -> None:
        self.path, self.digest, self.what = path, digest, what
        super().__init__(f"{path} ({digest}) is {what}")


class FolderNotEmpty(RegistryError, FileExistsError):
    code = "folder_not_empty"


class TooManyWatchers(RegistryError, OSError):
    code = "too_many_watchers"


class RateLimited(RegistryError, OSError):
    """`limit` is the rate that was passed, as 600/min; `retry_after_seconds` is when one more request is taken.

    `waited_seconds` is how long a client did before it gave up.
    """

    code = "rate_limited"

    def __init__(self, limit: str, retry_after_seconds: int, waited_seconds: int = 0) -> None:
        self.limit, self.retry_after_seconds, self.waited_seconds = limit, retry_after_seconds, waited_seconds
        waited = f"waited {waited_seconds} s in vain; " if waited_seconds else ""
        super().__init__(f"more than {limit} requests; {waited}try again in {retry_after_seconds} s")


class SigningUnavailable(RegistryError, OSError):
    code = "signing_unavailable"


class StoreUnavailable(RegistryError, OSError):
    code = "store_unavailable"


class RemoteError(RegistryError, OSError):
    code = "remote_error"


class Unauthorized(RemoteError, PermissionError):
    code = "unauthorized"


class Forbidden(RemoteError, PermissionError):
    code = "forbidden"
