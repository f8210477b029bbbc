package metrics

import (
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/viasocks/viasocks/stack/count"
)

// prefix is the beginning of the name of each metric.
const prefix = "viasocks_"

// Source provides the numbers for one scrape.
type Source struct {
	Each func(func(count.Metric)) // calls its argument with every number
	// Of identifies the data plane. If it changes, the counters have started again from zero.
	Of any
}

// Collector converts tables of package count to metrics. It implements prometheus.Collector.
type Collector struct {
	source func() Source

	mu   sync.Mutex // one scrape at a time
	of   any
	seen map[string]float64
}

// NewCollector returns a Collector that calls source at each scrape.
func NewCollector(source func() Source) *Collector { return &Collector{source: source} }

// Describe implements prometheus.Collector. It describes nothing, because the upstreams may change.
func (c *Collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector. A counter never decreases: the bytes of a flow that ends during the scrape
// may be missing, and Prometheus would take a lower value for a restart and show a huge rate. The next scrape includes
// them.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	source := c.source()
	if source.Of != c.of {
		c.of, c.seen = source.Of, nil
	}
	helps := map[string]string{}
	seen := make(map[string]float64, len(c.seen))
	source.Each(func(m count.Metric) {
		if m.Help != "" && helps[m.Name] == "" {
			helps[m.Name] = m.Help
		}
		names, values := split(m.Label)
		desc := prometheus.NewDesc(prefix+m.Name, helps[m.Name], names, nil)
		switch {
		case m.Times != nil:
			out <- histogram(desc, m.Times, values)
		case m.Gauge:
			out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, m.Value, values...)
		default:
			key := m.Key()
			seen[key] = max(m.Value, c.seen[key])
			out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, seen[key], values...)
		}
	})
	c.seen = seen
}

// split splits "a=b,c=d" into the names and the values of labels.
func split(label string) (names, values []string) {
	for pair := range strings.SplitSeq(label, ",") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			names, values = append(names, name), append(values, value)
		}
	}
	return names, values
}

func histogram(desc *prometheus.Desc, h *count.Histogram[uint64], values []string) prometheus.Metric {
	buckets, total := map[float64]uint64{}, uint64(0)
	for i, end := range count.Bounds {
		total += h.Buckets[i]
		buckets[end.Seconds()] = total
	}
	return prometheus.MustNewConstHistogram(desc, h.Count(), float64(h.Nanoseconds)/1e9, buckets, values...)
}
