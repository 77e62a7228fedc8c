// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// The metrics. Their labels are `direction` (outbound, inbound), `protocol` (tcp, udp) and `reason` (see Reason), and nothing else:
// the number of series is known beforehand.
var (
	opened = prometheus.NewDesc("pillion_connections_opened_total",
		"Connections accepted, including those that were refused at once.", []string{"direction", "protocol"}, nil)
	closed = prometheus.NewDesc("pillion_connections_closed_total",
		"Connections that ended, by the reason why.", []string{"direction", "protocol", "reason"}, nil)
	open = prometheus.NewDesc("pillion_connections_open",
		"Connections that are open now.", []string{"direction", "protocol"}, nil)
	sent = prometheus.NewDesc("pillion_sent_bytes_total",
		"Bytes passed on from the side that opened the connection.", []string{"direction", "protocol"}, nil)
	received = prometheus.NewDesc("pillion_received_bytes_total",
		"Bytes passed on to the side that opened the connection.", []string{"direction", "protocol"}, nil)
)

// register makes a registry of the book's own: two proxies in one process do not meet.
func (b *Book) register() {
	dial := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "pillion_dial_duration_seconds",
		Help:    "Time from the start of a dial until it was connected.",
		Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"direction"})
	for d := range directions {
		b.dialTime[d] = dial.WithLabelValues(d.String())
	}
	b.registry = prometheus.NewRegistry()
	b.registry.MustRegister(dial, collector{b}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
}

// Metrics serves the metrics in the Prometheus and OpenMetrics text formats.
func (b *Book) Metrics() http.Handler {
	return promhttp.HandlerFor(b.registry, promhttp.HandlerOpts{Registry: b.registry, EnableOpenMetrics: true, MaxRequestsInFlight: 4})
}

// collector turns the totals into metrics when they are asked for.
type collector struct{ book *Book }

func (collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{opened, closed, open, sent, received} {
		ch <- d
	}
}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	for p, t := range c.book.sum() {
		for d := range directions {
			labels := []string{d.String(), Protocol(p).String()}
			metric := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, more ...string) {
				ch <- prometheus.MustNewConstMetric(desc, kind, value, slices.Concat(labels, more)...)
			}
			metric(opened, prometheus.CounterValue, float64(t.opened[d]))
			metric(open, prometheus.GaugeValue, float64(t.open[d]))
			metric(sent, prometheus.CounterValue, float64(t.sent[d]))
			metric(received, prometheus.CounterValue, float64(t.received[d]))
			for r := range reasons {
				metric(closed, prometheus.CounterValue, float64(t.closed[d][r]), r.String())
			}
		}
	}
}
