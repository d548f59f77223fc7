"""A program of a stranger, in the form of the samples of Huawei's API Explorer: AK and SK from the environment, a region by its name, no address, no project.

It reinstalls two running instances with Linux and prints what the service answered. Nothing of Repave is in it.
"""

import os
import time

from huaweicloudsdkclouddc.v1 import CloudDCClient, ListInstancesRequest, ReinstallOSOptions, ReinstallOsRequest, ShowInstanceStatusRequest
from huaweicloudsdkclouddc.v1.region.clouddc_region import CloudDCRegion
from huaweicloudsdkcore.auth.credentials import BasicCredentials
from huaweicloudsdkcore.exceptions import exceptions

if __name__ == "__main__":
    credentials = BasicCredentials(os.environ["CLOUD_SDK_AK"], os.environ["CLOUD_SDK_SK"])
    client = CloudDCClient.new_builder().with_credentials(credentials).with_region(CloudDCRegion.value_of("cn-east-3")).build()
    try:
        running = client.list_instances(ListInstancesRequest(instance_state="running")).instances
        ids = [instance.id for instance in running if instance.image.os_type == "Linux"][:2]
        answer = client.reinstall_os(ReinstallOsRequest(body=ReinstallOSOptions(password="Sample-7!asked", instance_id_set=ids)))
        print("accepted", answer.status_code, *(instance.id for instance in answer.instances))
        for instance_id in ids:
            while (status := client.show_instance_status(ShowInstanceStatusRequest(id=instance_id))).state == "pending":
                time.sleep(0.2)
            print("ended", instance_id, status.state)
    except exceptions.ClientRequestException as refused:
        print(refused.status_code, refused.request_id, refused.error_code, refused.error_msg)
