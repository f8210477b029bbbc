package config

import (
	"fmt"
	"strings"
	"testing"
)

// What is allowed becomes rules behind the user's own, and there is no default: also where there is a proxy.
func TestAllow(t *testing.T) {
	const direct, proxy = "--dns tcp://192.0.2.1", "--proxy socks5://h"
	for _, tt := range []struct{ args, want string }{
		{direct + " --allow tcp:443", "[proto tcp port 443 direct] direct"},
		{proxy + " --allow tcp:443", "[proto tcp port 443 via proxy] proxy"},
		{direct + " --allow tcp:db.example.com:5432", "[proto tcp name db.example.com port 5432 direct] direct"},
		{direct + " --allow udp:.Example.com:1-9,12", "[proto udp name .example.com port 1-9,12 direct] direct"},
		{direct + " --allow tcp:*:80 --allow tcp:*.a.b:*", "[proto tcp port 80 direct proto tcp name *.a.b direct] direct"},
		{direct + " --allow tcp:*", "[proto tcp direct] direct"},
		{direct + " --allow tcp:10.0.0.0/8:80", "[proto tcp dst 10.0.0.0/8 port 80 direct] direct"},
		{direct + " --allow tcp:10.0.0.1:*", "[proto tcp dst 10.0.0.1/32 direct] direct"},
		{direct + " --allow tcp:[2001:db8::1]:80", "[proto tcp dst 2001:db8::1/128 port 80 direct] direct"},
		{direct + " --allow tcp:[2001:db8::/32]:*", "[proto tcp dst 2001:db8::/32 direct] direct"},
		{proxy + " --allow tcp:443 --rule drop", "[drop proto tcp port 443 via proxy] proxy"},
		{"--upstream b=socks5://h --allow tcp:443", "without --proxy"},
		{proxy + " --allow 443", "must be tcp:PORT"},
		{proxy + " --allow icmp:443", "must be tcp:PORT"},
		{proxy + " --allow tcp:", "the port is missing"},
		{proxy + " --allow tcp:example.com", "the port is missing"},
		{proxy + " --allow tcp:example.com:", "the port is missing"},
		{proxy + " --allow tcp:example.com:https", "the port is missing"},
		{proxy + " --allow tcp::443", "with an IPv6 address in brackets"},
		{proxy + " --allow tcp:2001:db8::1:443", "with an IPv6 address in brackets"},
		{proxy + " --allow tcp:[]:443", "no address between the brackets"},
		{proxy + " --allow tcp:0", `port "0": write a number`},
		{proxy + " --allow tcp:a_b!:80", `'!' cannot stand in a name`},
		{proxy + " --allow tcp:10.0.0.1/8:80", "has bits set beyond its length"},
		{proxy + " --allow tcp:bücher.example:80", "in letters of ASCII"},
	} {
		c, err := Parse(Check, strings.Fields(tt.args), nil)
		if err != nil {
			if !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "cannot use rule") {
				t.Errorf("%s: %v, want %s", tt.args, err, tt.want)
			}
			continue
		}
		var rules []string
		for i := range c.Rules {
			rules = append(rules, c.Rules[i].String())
		}
		if got := fmt.Sprint(rules, " ", c.ResolverDefault); got != tt.want || c.Default != "" {
			t.Errorf("%s: got %s, default %q, want %s", tt.args, got, c.Default, tt.want)
		}
	}
}
