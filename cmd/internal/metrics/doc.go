// Package metrics serves the counters of the data plane to Prometheus as text over HTTP, on a unix socket or a TCP
// port.
//
//	Address    where, as --metrics has it
//	Collector  turns the tables of package count into metrics; it reads them when somebody asks
//	Server     answers GET /metrics, within bounds of connections, headers and time
//
// The labels are those of the tables and the names of upstreams. No address of a program, destination or proxy appears.
package metrics
