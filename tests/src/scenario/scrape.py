# Scrapes /metrics in both formats with Prometheus' own parsers, and prints the samples as JSON: [name, labels, value].
# A page that a parser refuses, or two pages that do not hold the same series, end it with an error.
import json
import sys
import urllib.request

from prometheus_client import openmetrics, parser
import prometheus_client.openmetrics.parser


def scrape(accept):
    request = urllib.request.Request(sys.argv[1], headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def samples(families):
    found, typeless = [], []
    for family in families:
        if family.type in ("unknown", "untyped") or not family.documentation:
            typeless.append(family.name)
        found += [(sample.name, sample.labels, sample.value) for sample in family.samples]
    assert not typeless, f"without type or help: {typeless}"
    names = [(name, sorted(labels.items())) for name, labels, _ in found]
    assert all(names.count(name) == 1 for name in names), "a series twice"
    return found, sorted(names)


kind, page = scrape("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3")
assert kind.startswith("application/openmetrics-text; version=1.0.0"), kind
new, new_names = samples(openmetrics.parser.text_string_to_metric_families(page))
kind, page = scrape("text/plain;version=0.0.4")
assert kind.startswith("text/plain; version=0.0.4"), kind
_, old_names = samples(parser.text_string_to_metric_families(page))
# Drops of control's are shown once there are any, and answers to questions of a kind, too.
differ = [name for name in old_names + new_names if (name in old_names) != (name in new_names)]
grows = ("firezone_gateway_dropped_packets", "firezone_gateway_dns_lookup_duration_seconds")
assert all(name.startswith(grows) for name, _ in differ), differ
json.dump(new, sys.stdout)
