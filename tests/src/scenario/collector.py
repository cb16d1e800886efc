# A gRPC server that takes metrics as an OpenTelemetry collector does, and prints each message in hex. It knows nothing of
# what is in them. The first call is refused, as a collector does that is starting.
import sys
from concurrent import futures

import grpc

calls = 0


def export(request, context):
    global calls
    calls += 1
    if calls == 1:
        context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
    print(request.hex(), flush=True)
    return b""


handler = grpc.unary_unary_rpc_method_handler(export)
service = "opentelemetry.proto.collector.metrics.v1.MetricsService"
server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
assert server.add_insecure_port(sys.argv[1]) != 0
server.start()
print("listens", flush=True)
server.wait_for_termination()
