// SPDX-License-Identifier: Apache-2.0

package telemetry

import (
	"github.com/pillionproxy/pillion/proxy/loop"
	"github.com/prometheus/client_golang/prometheus"
)

// loopFigure is one of the event loops' figures.
type loopFigure struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(loop.Figures) float64
}

func figure(name, help string, kind prometheus.ValueType, value func(loop.Figures) float64) loopFigure {
	return loopFigure{prometheus.NewDesc("pillion_loop_"+name, help, nil, nil), kind, value}
}

var loopFigures = []loopFigure{
	figure("loops", "Event loops.", prometheus.GaugeValue, func(f loop.Figures) float64 { return float64(f.Loops) }),
	figure("connections", "TCP connections of the event loops; a relayed one is two.", prometheus.GaugeValue,
		func(f loop.Figures) float64 { return float64(f.Conns) }),
	figure("coroutines", "Coroutines of handlers that run or wait, and free ones; an idle connection has none.", prometheus.GaugeValue,
		func(f loop.Figures) float64 { return float64(f.Coroutines) }),
	figure("buffers", "Buffers of 64 KiB in use; what a peer does not take is in one.", prometheus.GaugeValue,
		func(f loop.Figures) float64 { return float64(f.Buffers) }),
	figure("buffers_free", "Buffers of 64 KiB that are kept for soon.", prometheus.GaugeValue,
		func(f loop.Figures) float64 { return float64(f.Free) }),
	figure("pipes", "Pipes of 1 MiB, in use or free.", prometheus.GaugeValue, func(f loop.Figures) float64 { return float64(f.Pipes) }),
	figure("timers", "Timers that are set.", prometheus.GaugeValue, func(f loop.Figures) float64 { return float64(f.Timers) }),
	figure("turns_total", "Turns of the event loops.", prometheus.CounterValue, func(f loop.Figures) float64 { return float64(f.Turns) }),
	figure("stalls_total", "Turns in which a handler held its loop for more than a second. The log has its stack.", prometheus.CounterValue,
		func(f loop.Figures) float64 { return float64(f.Stalls) }),
	figure("panics_total", "Handlers that panicked: each lost its connection. The log has their stacks.", prometheus.CounterValue,
		func(f loop.Figures) float64 { return float64(f.Panics) }),
}

// loopCollector turns figures into metrics when they are asked for.
type loopCollector func() loop.Figures

// WatchLoops has the event loops' figures among the metrics. It is called once at most.
func (b *Book) WatchLoops(figures func() loop.Figures) {
	b.registry.MustRegister(loopCollector(figures))
}

func (loopCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, f := range loopFigures {
		ch <- f.desc
	}
}

func (c loopCollector) Collect(ch chan<- prometheus.Metric) {
	now := c()
	for _, f := range loopFigures {
		ch <- prometheus.MustNewConstMetric(f.desc, f.kind, f.value(now))
	}
}
