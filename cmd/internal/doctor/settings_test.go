package doctor

import (
	"bytes"
	"encoding/json"
	"os"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A VPN's rules for IPv6 conflict as those for IPv4 do.
func TestConflictingRuleOfIPv6(t *testing.T) {
	needWorld(t)
	sh(t, "ip -6 route add default via "+there6+" table 51820 && ip -6 rule add not fwmark 0xca6c lookup 51820 pref 4000")
	t.Cleanup(func() { sh(t, "ip -6 rule del pref 4000; ip -6 route flush table 51820") })
	r := examine(t)
	r.is(t, "ip rules", Fault, "not fwmark 0xca6c", "lookup 51820", "takes all traffic", "--priority 3980")
	r.onlyFaults(t, "ip_rules")
	r = examine(t, "--priority", "3980")
	r.is(t, "ip rules", OK)
	sh(t, "ip -6 rule add to 2001:db8:77::/48 lookup 51820 pref 3000")
	r = examine(t, "--priority", "3980")
	sh(t, "ip -6 rule del pref 3000")
	r.is(t, "ip rules", Warning, "to 2001:db8:77::/48")
	r.onlyFaults(t)
}

// With a strict rp_filter, up has to change a setting; where it cannot, it does not start, and doctor says so before.
func TestStrictReversePath(t *testing.T) {
	needWorld(t)
	r := examine(t)
	for _, f := range r.Findings {
		if f.Check == "rp_filter" {
			t.Errorf("it is not strict: %+v", f)
		}
	}
	sh(t, "echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter")
	t.Cleanup(func() { sh(t, "echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter") })
	r = examine(t)
	r.is(t, "rp_filter", OK, "rp_filter is 1 on eth0", "src_valid_mark=1")
	r.is(t, "viasocks up", OK, "tried")
	r.onlyFaults(t)

	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { unix.Unmount("/proc/sys", unix.MNT_DETACH) })
	if err := unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Skip(err)
	}
	r = examine(t)
	r.is(t, "viasocks up", Fault, "rp_filter is 1 on eth0", "will not start", "--sysctl net.ipv4.conf.all.src_valid_mark=1")
	r.onlyFaults(t, "viasocks_up")
}

func TestUserNamespaceSettings(t *testing.T) {
	for _, tt := range []struct {
		name     string
		settings map[string]string
		root     bool
		level    Level
		words    []string
	}{
		{"none", nil, false, OK, []string{"Ordinary users may make them"}},
		{"AppArmor allows all", map[string]string{appArmorKey: "0"}, false, OK, []string{"Ordinary users"}},
		{"AppArmor restricts", map[string]string{appArmorKey: "1"}, false, OK, []string{"AppArmor restricts them", appArmorKey + "=1"}},
		{"AppArmor restricts, root", map[string]string{appArmorKey: "1"}, true, OK,
			[]string{"AppArmor restricts them", "the AppArmor profile of the viasocks package"}},
		{"Debian's switch", map[string]string{"kernel.unprivileged_userns_clone": "0"}, false, Fault,
			[]string{"kernel.unprivileged_userns_clone=0", "sysctl -w kernel.unprivileged_userns_clone=1", "needs root"}},
		{"no room", map[string]string{"user.max_user_namespaces": "0", appArmorKey: "1"}, true, Warning,
			[]string{"user.max_user_namespaces=0", "sysctl -w user.max_user_namespaces=10000", "Only root"}},
	} {
		h := &host{root: tt.root}
		f := h.userns(func(key string) string { return tt.settings[key] })
		if f.Level != tt.level {
			t.Errorf("%s: %+v; want %s", tt.name, f, tt.level)
		}
		for _, w := range tt.words {
			if !strings.Contains(f.Found+"\n"+f.Means+"\n"+f.Do, w) {
				t.Errorf("%s: no %q in %+v", tt.name, w, f)
			}
		}
	}
}

// The JSON has the fields that the manual names, and no others.
func TestJSONFields(t *testing.T) {
	needWorld(t)
	r := examine(t, "--proxy", "socks5://"+there4+":9")
	dec := json.NewDecoder(bytes.NewReader([]byte(r.text)))
	dec.DisallowUnknownFields()
	var report Report
	if err := dec.Decode(&report); err != nil {
		t.Fatalf("%v in\n%s", err, r.text)
	}
	count := map[Level]int{}
	for _, f := range report.Findings {
		if f.Part != thisHost && !strings.HasPrefix(f.Part, "proxy socks5://") || f.Check == "" || f.Found == "" {
			t.Errorf("an incomplete finding: %+v", f)
		}
		count[f.Level]++
	}
	if count[Fault] != report.Faults || count[Warning] != report.Warnings || count[NotTested] != report.NotTested ||
		count[OK] != len(report.Findings)-report.Faults-report.Warnings-report.NotTested || report.Faults == 0 {
		t.Errorf("%v; the report counts %d, %d, %d", count, report.Faults, report.Warnings, report.NotTested)
	}
	if r.exit != 1 {
		t.Errorf("exit status %d", r.exit)
	}
	if report.Seconds <= 0 || report.Seconds > Limit.Seconds() {
		t.Errorf("it took %v s", report.Seconds)
	}
	manual, err := os.ReadFile("../../viasocks/viasocks.1")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(manual), ".It Cm doctor\n")
	text, _, _ = strings.Cut(text, ".It Cm health\n")
	for _, of := range []reflect.Type{reflect.TypeFor[Report](), reflect.TypeFor[Finding]()} {
		for i := range of.NumField() {
			name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
			if !strings.Contains(text, ".Li "+name) {
				t.Errorf("the manual does not name the field %s", name)
			}
		}
	}
	for _, l := range []Level{OK, Warning, Fault, NotTested} {
		if !strings.Contains(text, ".Li "+string(l)) {
			t.Errorf("the manual does not name the level %s", l)
		}
	}
}
