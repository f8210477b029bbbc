package config

import (
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestHostDefaults(t *testing.T) {
	c, err := Parse(Up, []string{proxyFlag}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Host{
		LAN: "direct", Resolved: true, Inbound: "keep", NFTable: "viasocks", Priority: 9000, ControlGroup: -1,
		TakeoverLimit: time.Hour,
	}
	if !reflect.DeepEqual(c.Host, want) {
		t.Errorf("%+v", c.Host)
	}
	if !c.Host.Exclude.Empty() || !c.Host.Include.Empty() {
		t.Error("something is selected")
	}
	for args, want := range map[string]string{"--strict": "refuse", "--strict --lan carry": "carry", "--lan carry": "carry"} {
		c, err := Parse(Up, append(strings.Fields(args), proxyFlag), nil)
		if err != nil || c.Host.LAN != want {
			t.Errorf("%s: %v, %v", args, c, err)
		}
	}
}

func TestSelections(t *testing.T) {
	file := write(t, `proxy socks5://h
exclude 203.0.113.9, 2001:db8::/32
exclude 198.51.100.7/24
exclude-uid root,1000-1999
exclude-port 22,6881-6889
exclude-device tun0
inbound carry
inbound-port 53, 27015-27020
inbound-port 51820
exclude-cgroup /sys/fs/cgroup/system.slice/chrony.service/, a.slice
include-port 443
confirm 1m
fail-open
control-group 27
`, 0o600)
	c, err := Parse(Up, []string{"--config", file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := Selection{
		Nets: []netip.Prefix{
			netip.MustParsePrefix("203.0.113.9/32"),
			netip.MustParsePrefix("2001:db8::/32"),
			netip.MustParsePrefix("198.51.100.0/24"),
		},
		UIDs:    []Range[uint32]{{0, 0}, {1000, 1999}},
		Ports:   []Range[uint16]{{22, 22}, {6881, 6889}},
		Devices: []string{"tun0"},
		Cgroups: []string{"system.slice/chrony.service", "a.slice"},
	}
	if !reflect.DeepEqual(c.Host.Exclude, want) {
		t.Errorf("%+v", c.Host.Exclude)
	}
	if got := c.Host.Include.Ports; len(got) != 1 || got[0].String() != "443" || c.Host.Exclude.Ports[1].String() != "6881-6889" {
		t.Errorf("%v", got)
	}
	if want := []Range[uint16]{{53, 53}, {27015, 27020}, {51820, 51820}}; !reflect.DeepEqual(c.Host.InboundPorts, want) {
		t.Errorf("%v", c.Host.InboundPorts)
	}
	if c.Host.Confirm != time.Minute || !c.Host.FailOpen || c.Host.ControlGroup != 27 || c.File != file {
		t.Errorf("%+v", c)
	}
	// One file serves run too, and a flag replaces the file's list.
	if _, err := Parse(Run, []string{"--config", file, "prog"}, nil); err != nil {
		t.Error(err)
	}
	c, err = Parse(Up, []string{"--config", file, "--exclude", "192.0.2.1"}, nil)
	if err != nil || len(c.Host.Exclude.Nets) != 1 || len(c.Host.Exclude.Ports) != 2 {
		t.Errorf("%+v, %v", c, err)
	}
}

func TestHostErrors(t *testing.T) {
	for _, tt := range []struct{ args, want string }{
		{"--lan no", "must be direct, carry or refuse"},
		{"--strict --lan direct", "cannot use --lan direct with --strict"},

		{"--nft-table 1", "must be a letter"},
		{"--inbound drop", "must be keep or carry"},
		{"--exclude 1.2.3", `"1.2.3" is neither an address nor a network`},
		{"--exclude 1.2.3.4,", `"" is neither`},
		{"--exclude 0.0.0.0/0", "is everything"},
		{"--exclude fe80::1%eth0", "is neither"},
		{"--exclude ::ffff:1.2.3.4", "write it as IPv4"},
		{"--exclude 10.0.0.0/8 --include 10.1.2.3/8", "cannot include 10.0.0.0/8: it is excluded too"},
		{"--exclude-uid no-such-user", `there is no user "no-such-user"`},
		{"--exclude-uid 5-4", "neither a user nor a range"},
		{"--exclude-uid 4294967295", "neither a user nor a range"},
		{"--exclude-uid -1", "there is no user"},
		{"--exclude-port 0", "is not a port"},
		{"--exclude-port 65536", "is not a port"},
		{"--exclude-port 80-", "is not a port"},
		{"--inbound-port 0", "is not a port"},
		{"--inbound-port 9-8", "is not a port"},
		{"--inbound carry --inbound-port 51820", "cannot use --inbound-port with --inbound carry"},
		{"--exclude-port 50-60", "port 53 is always viasocks'"},
		{"--include-port 53", "port 53 is always viasocks'"},
		{"--exclude-device a/b", "is not the name of a device"},
		{"--exclude-device lo", "is not the name of a device"},
		{"--exclude-cgroup /", "is not the path of a control group"},
		{"--exclude-cgroup a/../b", "is not the path of a control group"},
		{"--confirm 1s", "must be from 5s to 24h"},
		{"--strict=maybe", "must be true or false"},
		{"--priority 32766", "must be a number from 1 to 32000"},
		{"--control-group no-such-group", "there is no such group"},
	} {
		_, err := Parse(Up, append([]string{proxyFlag}, strings.Fields(tt.args)...), nil)
		if !errors.As(err, new(*UsageError)) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: got %v, want %q", tt.args, err, tt.want)
		}
	}
	var many []string
	for range maxSelected + 1 {
		many = append(many, "192.0.2.1")
	}
	if _, err := Parse(Up, []string{proxyFlag, "--exclude", strings.Join(many, ",")}, nil); err == nil ||
		!strings.HasSuffix(err.Error(), "more than 256") {
		t.Error(err)
	}
}

// The commands that only ask need no proxy.
func TestAsking(t *testing.T) {
	c, err := Parse(Flows, []string{"--json", "--limit", "7"}, nil)
	if err != nil || !c.JSON || c.Limit != 7 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, tt := range []struct {
		cmd  Command
		args []string
	}{{Status, []string{"--limit", "7"}}, {Confirm, []string{"--json"}}, {Status, []string{"word"}},
		{Flows, []string{"--limit", "0"}}} {
		if _, err := Parse(tt.cmd, tt.args, nil); !errors.As(err, new(*UsageError)) {
			t.Errorf("%v: %v", tt.args, err)
		}
	}
	if !slices.ContainsFunc(Options, func(o Option) bool { return o.Cmds == Flows }) {
		t.Error("the table has no option of flows")
	}
}
