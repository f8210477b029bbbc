package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/cmd/internal/harness"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// startFTP starts vsftpd at other4 and returns its directory, see harness.FTPServer.
func startFTP(t *testing.T) (files string, content []byte) {
	t.Helper()
	needWorld(t)
	needPrograms(t, "vsftpd", "curl")
	if os.Getuid() != 0 {
		t.Skip("vsftpd needs root")
	}
	conf, files, content := harness.FTPServer(t, other4)
	serve(t, other4+":21", "vsftpd", conf)
	return files, content
}

// curlFTP runs curl under viasocks with --ftp-active and returns what both say, and the exit status of curl.
func curlFTP(t *testing.T, url, active string, args ...string) (said string, exit int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*testkit.Patience)
	defer cancel()
	all := []string{"run", "--log-level", "info", "--proxy", url, "--ftp-active", active, "--", "curl", "-sSv", "--max-time",
		fmt.Sprint(int(2 * testkit.Patience.Seconds()))}
	cmd := exec.CommandContext(ctx, viasocks, append(all, args...)...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if bytes.Contains(out, []byte("DATA RACE")) || bytes.Contains(out, []byte("panic:")) {
		t.Errorf("viasocks crashed:\n%s", out)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// TestActiveFTP: curl downloads and uploads with EPRT and with PORT, from a vsftpd that has no PASV, by BIND of dante.
func TestActiveFTP(t *testing.T) {
	if !apart(t) {
		return
	}
	url := binding(t)
	files, content := startFTP(t)
	want := sha256.Sum256(content)
	for _, verb := range []string{"EPRT", "PORT"} {
		t.Run(verb, func(t *testing.T) {
			args := []string{"--ftp-port", "-"}
			if verb == "PORT" {
				args = append(args, "--disable-eprt")
			}
			to := filepath.Join(t.TempDir(), "got")
			said, exit := curlFTP(t, url, "21", append(args, "-o", to, "ftp://"+other4+"/file")...)
			got, _ := os.ReadFile(to)
			if exit != 0 || sha256.Sum256(got) != want {
				t.Fatalf("download: curl ended with %d, and %d bytes came\n%s", exit, len(got), said)
			}
			if !strings.Contains(said, "> "+verb+" ") {
				t.Errorf("curl does not use %s:\n%s", verb, said)
			}
			if !strings.Contains(said, "rule=ftp-active") || strings.Count(said, "dst="+other4+":") != 2 {
				t.Errorf("the log does not show the server's connection:\n%s", said)
			}
			said, exit = curlFTP(t, url, "2121,21", append(args, "-T", to, "ftp://"+other4+"/up/"+verb)...)
			up := filepath.Join(files, "up", verb)
			testkit.Eventually(t, "the whole upload", func() bool {
				b, _ := os.ReadFile(up)
				return sha256.Sum256(b) == want
			})
			if exit != 0 {
				t.Errorf("upload: curl ended with %d\n%s", exit, said)
			}
		})
	}
}

// Two transfers on one control connection need an endpoint each.
func TestActiveFTPTwice(t *testing.T) {
	url := binding(t)
	_, content := startFTP(t)
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	said, exit := curlFTP(t, url, "21", "--ftp-port", "-", "-o", a, "-o", b, "ftp://"+other4+"/file", "ftp://"+other4+"/file")
	if exit != 0 || strings.Count(said, "226 Transfer complete") != 2 || strings.Count(said, "220 ") != 1 {
		t.Fatalf("curl ended with %d\n%s", exit, said)
	}
	for _, path := range []string{a, b} {
		if got, _ := os.ReadFile(path); !bytes.Equal(got, content) {
			t.Errorf("%s has %d other bytes", path, len(got))
		}
	}
}

// TestActiveFTPRefused: a proxy without BIND leads to 500 from the server, at once. Of other ports nothing is rewritten.
func TestActiveFTPRefused(t *testing.T) {
	srv := listenSOCKS(t)
	srv.SetFault(func(r sockstest.Request) sockstest.Fault {
		if r.Cmd == sockstest.CmdBind {
			return sockstest.Reply(7)
		}
		return sockstest.Fault{}
	})
	startFTP(t)
	said, exit := curlFTP(t, srv.URL(), "21", "--ftp-port", "-", "ftp://"+other4+"/file")
	const failed = 30 // CURLE_FTP_PORT_FAILED
	if exit != failed || strings.Count(said, "< 500 ") != 2 || !strings.Contains(said, "cannot do active FTP") {
		t.Errorf("curl ended with %d\n%s", exit, said)
	}
	said, exit = curlFTP(t, srv.URL(), "2121", "--ftp-port", "-", "ftp://"+other4+"/file")
	if exit != failed || strings.Contains(said, "cannot do active FTP") {
		t.Errorf("curl ended with %d\n%s", exit, said)
	}
}
