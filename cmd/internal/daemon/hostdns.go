package daemon

import (
	"net"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/route"
	"github.com/viasocks/viasocks/route/dns"
)

// hostDNS is how servers of DNS are asked past every proxy. The host's own are found anew for each question, since the host may
// come to another network; up: the whole host is carried. control makes their sockets ones that are not carried; nil: none is.
func hostDNS(up bool, control func(fd int) error) route.HostDNS {
	d := net.Dialer{Control: rawControl(control)}
	return route.HostDNS{
		Dial: d.DialContext,
		Servers: func() (all []dns.DirectServer) {
			servers, _ := config.HostServers(up) // config.Parse has warned where there are none
			for _, a := range servers {
				all = append(all, dns.DirectServer{Addr: a})
			}
			return all
		},
	}
}
