"""Re-check a table: its listing, its record and its parts must all say the same. Nothing on storage is changed.

A finding is damage (the table is wrong), a leftover (nobody needs it, or the next job removes it), or unfinished work
(the next job does it). Only damage fails a table. A killed run leaves shards without an end behind: unfinished. Where
the end is there and a part before it is not, a part was lost as far as anybody can tell: damage, although a run that
was killed while it wrote several parts at once looks the same. Either way the next extract makes what is missing.

Not to be told from storage: what a copy for people says; a changed key, label, size, metadata value or image digest,
or a changed prediction that is still well-formed (their columns have no checksum); a wrong embedding written with its
own checksum; a shard that is missing with all its parts (`source_shards` can tell), or whose parts behind the last
full one are gone (unfinished).
"""

from engine.verification.findings import Damage, Finding, Leftover, Unfinished, Verification
from engine.verification.table import source_shards, verify_table

__all__ = [
    "Damage",
    "Finding",
    "Leftover",
    "Unfinished",
    "Verification",
    "source_shards",
    "verify_table",
]
