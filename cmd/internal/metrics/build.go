package metrics

import (
	"runtime"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"
)

// gvisor is the module whose version is shown beside our own, because it handles most of the work on a packet.
const gvisor = "gvisor.dev/gvisor"

// buildInfo is the metric that names the running version. Its value is always 1.
func buildInfo(version string) prometheus.Collector {
	labels := prometheus.Labels{"version": version, "goversion": runtime.Version(), "revision": "", "gvisor": ""}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				labels["revision"] = s.Value
			}
		}
		for _, m := range info.Deps {
			if m.Path == gvisor {
				labels["gvisor"] = m.Version
			}
		}
	}
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: prefix + "build_info", Help: "The program that runs; always 1.", ConstLabels: labels,
	}, func() float64 { return 1 })
}
