"""What client, server and adapter must agree on, and nothing else.

`namespace` says what two engines must share to share KV, `prefix` names a block by its tokens,
`grid` does the arithmetic of cells, pages and regions, `v1` holds the gRPC messages.

Rule 1: this package imports nothing of ours.
Rule 2: a change to any byte that these modules produce is a new format version.
"""
