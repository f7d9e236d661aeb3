"""kvserver's KV connector for vLLM 0.31 to 0.33.

Importing this package does nothing. vLLM calls `register` through the entry point
`vllm.general_plugins`, after which `"kv_connector": "KVServerConnector"` is enough; without the
entry point, `"kv_connector_module_path": "kvserver_vllm.connector"` does the same.
"""

from __future__ import annotations

CONNECTOR = "KVServerConnector"


def register() -> None:
    """Make the bare connector name known to vLLM. Calling it again changes nothing."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "kvserver_vllm.connector", CONNECTOR)
