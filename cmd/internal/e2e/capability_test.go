package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// tearDown prints the capabilities of a program, and tries to remove its network. Where that succeeds, the program waits
// until viasocks ends it: a program that ends by itself before viasocks has noticed has a status of its own.
const tearDown = `grep -E '^Cap(Inh|Prm|Eff|Amb)' /proc/self/status
tried() { "$@" >/dev/null 2>&1; echo "$1 $3: $?"; }
tried ip route flush table main
tried ip link set tun0 down
tried ip link del tun0
tried nft add table inet t
ls /sys/class/net
[ -e /sys/class/net/tun0 ] || exec sleep 30`

// TestRunCapabilities: only a program of root has capabilities in the network of run, those that its caller has. No other
// program can change anything there, whether viasocks made the namespace or it has a name. If root's program deletes the TUN,
// it is ended.
func TestRunCapabilities(t *testing.T) {
	if !apart(t) {
		return
	}
	needNamed(t, "blue")
	openTUNForAll(t)
	proxy := listenSOCKS(t)
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	caps := regexp.MustCompile(`(?m)^Cap(Inh|Prm|Eff|Amb):.*\n`)
	all := strings.Join(caps.FindAllString(string(own), -1), "")
	none := regexp.MustCompile(`[0-9a-f]{16}`).ReplaceAllString(all, strings.Repeat("0", 16))
	for _, tt := range []struct {
		uid   uint32
		flags []string
		caps  string
	}{
		{nobody, nil, none},
		{0, []string{"--user", "nobody"}, none},
		{0, []string{"--user", "nobody", "--netns", "blue"}, none},
		{0, nil, all},
		{0, []string{"--netns", "blue"}, all},
	} {
		t.Run(fmt.Sprint("uid ", tt.uid, " ", tt.flags), func(t *testing.T) {
			args := append([]string{"run", "--proxy", proxy.URL()}, tt.flags...)
			cmd := exec.Command(viasocks, append(args, "--", "sh", "-c", tearDown)...)
			cmd.Dir, cmd.Env = "/", []string{"PATH=" + os.Getenv("PATH"), "HOME=/"}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: tt.uid, Gid: tt.uid}}
			got, err := output(cmd)
			if !strings.HasPrefix(got, tt.caps) {
				t.Errorf("%v\n%swant\n%s", err, got, tt.caps)
			}
			if tt.caps == all { // the TUN is gone
				if cmd.ProcessState.ExitCode() != 3 || !strings.Contains(got, "the program is ended") {
					t.Errorf("root's program deleted the TUN: %v\n%s", err, got)
				}
				return
			}
			if err != nil || strings.Contains(got, ": 0\n") || !strings.HasSuffix(got, "\nlo\ntun0\n") {
				t.Errorf("it could change its network: %v\n%s", err, got)
			}
		})
	}
}
