# The call home of Windows: what cloudbase-init runs as a script of the user data. `firstboot` sends this file's text with its settings.
# Never run on a real Windows (docs/limits.md). Windows PowerShell 5.1 with what Windows brings; C# 5, which its compiler takes.
#
# cloudbase-init runs user data before it sets the password, and may start Windows anew in between. So the first run only leaves a task
# that SYSTEM runs now and at each start, until it is done. The order of that task is its promise:
#
#     wait until the password is set | try it once | write down what was found | erase the config drive and the copies | call home
#
# The password is nowhere in here: it is read from the drive, known by its label and this run's nonce, and kept in memory alone.
param([switch] $AfterSetup)
$ErrorActionPreference = 'Stop'
$Config = '{}' | ConvertFrom-Json

$Folder = Join-Path $env:ProgramData 'Repave'
$Found = Join-Path $Folder 'found.json'
$Task = 'Repave call home'
$GiveUpS = 3600
$RetryS = 2
$MiB = 1048576

Add-Type -TypeDefinition @'
using System;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Runtime.InteropServices;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using Microsoft.Win32.SafeHandles;

public static class RepaveHome
{
    [DllImport("kernel32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
    static extern SafeFileHandle CreateFile(string name, uint access, uint share, IntPtr security, uint how, uint flags, IntPtr template);

    [DllImport("advapi32.dll", CharSet = CharSet.Unicode, SetLastError = true)]
    static extern bool LogonUser(string user, string domain, string password, int kind, int provider, out IntPtr token);

    [DllImport("kernel32.dll")]
    static extern bool CloseHandle(IntPtr handle);

    // .NET's own FileStream refuses the names of devices.
    static FileStream OpenDisk(uint number, bool write)
    {
        uint access = write ? 0xC0000000u : 0x80000000u;  // GENERIC_READ, GENERIC_WRITE
        uint writeThrough = write ? 0x80000000u : 0u;
        SafeFileHandle handle = CreateFile(@"\\.\PhysicalDrive" + number, access, 3, IntPtr.Zero, 3, writeThrough, IntPtr.Zero);
        if (handle.IsInvalid) throw new IOException("disk " + number + ": error " + Marshal.GetLastWin32Error());
        return new FileStream(handle, write ? FileAccess.ReadWrite : FileAccess.Read, 1048576);
    }

    public static byte[] ReadDisk(uint number, ulong offset, int count)
    {
        byte[] data = new byte[count];
        using (FileStream disk = OpenDisk(number, false))
        {
            disk.Seek((long)offset, SeekOrigin.Begin);
            for (int done = 0, n; done < count; done += n)
                if ((n = disk.Read(data, done, count - done)) == 0) break;
        }
        return data;
    }

    public static void ZeroDisk(uint number, ulong offset, ulong size)
    {
        byte[] zeros = new byte[65536];
        using (FileStream disk = OpenDisk(number, true))
        {
            disk.Seek((long)offset, SeekOrigin.Begin);
            for (ulong left = size; left > 0; left -= Math.Min(left, (ulong)zeros.Length))
                disk.Write(zeros, 0, (int)Math.Min(left, (ulong)zeros.Length));
            disk.Flush(true);
        }
    }

    public static bool MayLogOn(string user, string password)
    {
        IntPtr token;
        if (!LogonUser(user, ".", password, 3, 0, out token)) return false;  // 3: as over the network
        CloseHandle(token);
        return true;
    }

    // The HTTP status, 0 without an answer. Only certificates of our CA are taken. Their name is not looked at: this CA signs for nobody
    // but the service, and .NET does not take an address from a certificate for the host's name everywhere.
    public static int Post(string url, string nonce, string body, string caPem)
    {
        X509Certificate2 ca = new X509Certificate2(Encoding.ASCII.GetBytes(caPem));
        byte[] data = Encoding.UTF8.GetBytes(body);
        ServicePointManager.SecurityProtocol = (SecurityProtocolType)3072;  // TLS 1.2
        HttpWebRequest request = (HttpWebRequest)WebRequest.Create(url);
        request.Method = "POST";
        request.ContentType = "application/json";
        request.Headers["Authorization"] = "Bearer " + nonce;
        string asked = Guid.NewGuid().ToString("N");
        request.Headers["X-Repave-Ask"] = asked;
        request.Proxy = null;
        request.Timeout = 10000;
        request.AllowAutoRedirect = false;
        request.ServicePoint.Expect100Continue = false;
        request.ServerCertificateValidationCallback = delegate(object sender, X509Certificate shown, X509Chain unused, SslPolicyErrors errors)
        {
            return shown != null && IsSignedBy(ca, new X509Certificate2(shown));
        };
        try
        {
            using (Stream stream = request.GetRequestStream()) stream.Write(data, 0, data.Length);
            using (HttpWebResponse response = (HttpWebResponse)request.GetResponse()) return StatusOf(response, asked);
        }
        catch (IOException)  // a connection that broke while it was written to
        {
            return 0;
        }
        catch (WebException error)
        {
            using (HttpWebResponse response = error.Response as HttpWebResponse) return StatusOf(response, asked);
        }
    }

    // An answer repeats what was asked with, or it is another run's.
    static int StatusOf(HttpWebResponse response, string asked)
    {
        return response != null && response.Headers["X-Repave-Ask"] == asked ? (int)response.StatusCode : 0;
    }

    static bool IsSignedBy(X509Certificate2 ca, X509Certificate2 shown)
    {
        X509Chain chain = new X509Chain();
        chain.ChainPolicy.ExtraStore.Add(ca);
        chain.ChainPolicy.RevocationMode = X509RevocationMode.NoCheck;
        chain.ChainPolicy.VerificationFlags = X509VerificationFlags.AllowUnknownCertificateAuthority;
        if (!chain.Build(shown) || chain.ChainElements.Count < 2) return false;
        byte[] root = chain.ChainElements[chain.ChainElements.Count - 1].Certificate.RawData;
        return Convert.ToBase64String(root) == Convert.ToBase64String(ca.RawData);
    }
}
'@

function Register-AfterSetup {
    New-Item -ItemType Directory -Force $Folder | Out-Null
    & icacls.exe $Folder /inheritance:r /grant '*S-1-5-18:(OI)(CI)F' '*S-1-5-32-544:(OI)(CI)F' | Out-Null
    Copy-Item -Force $PSCommandPath (Join-Path $Folder 'home.ps1')
    $run = "-NoProfile -NonInteractive -ExecutionPolicy Bypass -File `"$Folder\home.ps1`" -AfterSetup"
    $registered = @{
        TaskName  = $Task
        Action    = New-ScheduledTaskAction -Execute (Join-Path $PSHOME 'powershell.exe') -Argument $run
        Trigger   = New-ScheduledTaskTrigger -AtStartup
        Principal = New-ScheduledTaskPrincipal -UserId 'S-1-5-18' -LogonType ServiceAccount -RunLevel Highest
        Settings  = New-ScheduledTaskSettingsSet -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
    }
    Register-ScheduledTask @registered -Force | Out-Null
    Start-ScheduledTask -TaskName $Task
}

# The partition that is this run's config drive: disk, offset, size, and its text. An ISO 9660 volume (ECMA-119, 8.4) with our nonce in it.
function Find-ConfigDrive {
    foreach ($partition in Get-Partition | Where-Object { $_.Size -ge $MiB / 16 -and $_.Size -le 256 * $MiB }) {
        $count = [int] [Math]::Min([uint64] $partition.Size, [uint64] (8 * $MiB))
        try { $data = [RepaveHome]::ReadDisk($partition.DiskNumber, $partition.Offset, $count) } catch { continue }  # offline, or an empty card reader
        $text = [Text.Encoding]::GetEncoding(28591).GetString($data)  # a character for each byte
        if ($text.Substring(32769, 5) -ceq 'CD001' -and $text.Substring(32808, 8) -eq 'config-2' -and $text.Contains($Config.nonce)) {
            return @{ Disk = $partition.DiskNumber; Offset = $partition.Offset; Size = $partition.Size; Text = $text }
        }
    }
}

# cloudbase-init notes in the registry which of its plugins are done with this instance (1: done).
function Wait-ForPasswordPlugin {
    $end = (Get-Date).AddSeconds($GiveUpS)
    while ((Get-Date) -lt $end) {
        foreach ($software in 'HKLM:\SOFTWARE', 'HKLM:\SOFTWARE\WOW6432Node') {
            $key = "$software\Cloudbase Solutions\Cloudbase-Init\$($Config.instance_id)\Plugins"
            if ((Get-ItemProperty $key -ErrorAction SilentlyContinue).SetUserPasswordPlugin -eq 1) { return }
        }
        Start-Sleep -Seconds $RetryS
    }
}

# One try: Windows locks an account after a few that fail. By default cloudbase-init wants the password changed at the first logon; the one
# that was asked for is meant to stay.
function Test-Password([string] $text) {
    if (-not ($text -match '"admin_pass": "([^"]*)"')) { return $false }
    $password = $Matches[1]
    $account = [ADSI] "WinNT://./$($Config.user),user"
    $account.PasswordExpired = 0
    $account.SetInfo()
    return [RepaveHome]::MayLogOn($Config.user, $password)
}

# NVMe disks show an identifier of the namespace as their SerialNumber; the adapter's is the one that Linux and BMCs show.
function Find-RootSerial {
    $number = (Get-Partition -DriveLetter $env:SystemDrive[0]).DiskNumber
    $physical = Get-PhysicalDisk | Where-Object { $_.DeviceId -eq "$number" } | Select-Object -First 1
    foreach ($serial in $physical.AdapterSerialNumber, (Get-Disk -Number $number).SerialNumber) {
        if ("$serial".Trim()) { return "$serial".Trim() }
    }
    return ''
}

# What cloudbase-init unpacked of the drive for as long as it runs; it keeps in memory what it still needs.
function Clear-Copies {
    foreach ($place in "$env:SystemRoot\Temp", "$env:SystemDrive\Users\*\AppData\Local\Temp") {
        foreach ($copy in Get-ChildItem "$place\*\openstack\latest\user_data" -ErrorAction SilentlyContinue) {
            if (-not [IO.File]::ReadAllText($copy.FullName).Contains($Config.nonce)) { continue }
            foreach ($file in Get-ChildItem $copy.DirectoryName -File) { [IO.File]::WriteAllBytes($file.FullName, (New-Object byte[] $file.Length)) }
        }
    }
}

function Invoke-CallHome {
    $end = (Get-Date).AddSeconds($GiveUpS)
    do {
        $status = [RepaveHome]::Post($Config.home_url, $Config.nonce, [IO.File]::ReadAllText($Found), $Config.ca_pem)
        if (($status -ge 200 -and $status -lt 300) -or $status -eq 410) { return }  # taken, or the run is over
        Start-Sleep -Seconds $RetryS
    } while ((Get-Date) -lt $end)
}

if (-not $AfterSetup) {
    Register-AfterSetup
    exit 0
}
if (-not (Test-Path $Found)) {
    $drive = Find-ConfigDrive
    if (-not $drive) { exit 1 }
    Wait-ForPasswordPlugin
    $usable = $false
    try { $usable = Test-Password $drive.Text } catch { }
    $keys = @(Get-Content "$env:ProgramData\ssh\ssh_host_*_key.pub" -ErrorAction SilentlyContinue)
    $answer = @{
        boot_id          = 'windows-' + (Get-CimInstance Win32_OperatingSystem).LastBootUpTime.ToUniversalTime().Ticks
        root_disk_serial = Find-RootSerial
        ssh_host_keys    = @($keys | ForEach-Object { ($_ -split ' ')[0, 1] -join ' ' })
        password_usable  = $usable
    }
    [IO.File]::WriteAllText("$Found.new", (ConvertTo-Json -Compress $answer))
    [IO.File]::Move("$Found.new", $Found)
}
while ($drive = Find-ConfigDrive) {
    [RepaveHome]::ZeroDisk($drive.Disk, $drive.Offset, $drive.Size)
}
try { Clear-Copies } catch { }
Invoke-CallHome
Unregister-ScheduledTask -TaskName $Task -Confirm:$false
Remove-Item -Recurse -Force $Folder
